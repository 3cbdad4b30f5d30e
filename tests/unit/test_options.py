"""Words of the command line: paths of all commands, and spellings of values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from cifar_dist import cli, compare, doctor, evaluate, plan, prepare, report, seeds, sweep
from cifar_dist import runs as runs_command
from cifar_dist.benchmarks.settings import BenchConfig, CompareConfig
from cifar_dist.cluster import slurm
from cifar_dist.config import Config, to_plain, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.offline import bundle, lean
from tests.support import runs

COMMANDS: dict[type, list[str]] = {  # with the words that each needs
    Config: [], evaluate.EvaluateArguments: ["--checkpoint", "c"], prepare.PrepareConfig: [], BenchConfig: ["all"],
    plan.PlanArguments: ["configs/quickstart.yaml"], sweep.SweepArguments: ["quickstart"],
    seeds.SeedsArguments: ["r"], report.ReportArguments: ["r"], bundle.BundleConfig: ["--ffcv-wheel", "w"],
    lean.LeanConfig: ["--ffcv-wheel", "w"], doctor.DoctorArguments: [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/my $HOME")
    monkeypatch.setenv("SCRATCH", "/scratch/~/$x")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)


def path_options(cls: type, prefix: str = "") -> Iterator[str]:
    """The options of a command whose values are paths."""
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from path_options(hint, "" if hint is Config else f"{prefix}{name}.")  # type: ignore[arg-type]
        elif hint is Path or Path in get_args(hint):
            yield prefix + ("data.dir" if cls is BenchConfig and name == "data_dir" else name)


def value(settings: Any, option: str) -> Any:
    if isinstance(settings, plan.PlanArguments | sweep.SweepArguments) and "." in option:
        settings = settings.settings
    if isinstance(settings, BenchConfig):
        option = option.replace(".", "_")
    for name in option.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_every_path_option_of_every_command_is_expanded(cls: type) -> None:
    names = [name for name in path_options(cls) if name not in ("config", "run", "runs")]
    words = [part for name in names for part in (f"--{name}", "~/${SCRATCH}$$")]
    settings: Any = cli.parse(cls, [*COMMANDS[cls], *words], "x")
    assert {name: str(value(settings, name)) for name in names} == dict.fromkeys(names, "/my $HOME/scratch/~/$x$")
    without = (Config, prepare.PrepareConfig, sweep.SweepArguments, report.ReportArguments, bundle.BundleConfig,
               lean.LeanConfig)  # fmt: skip
    assert "json" in names or cls in without
    if cls is Config:
        assert names == ["run.dir", "run.resume", "data.dir", "data.source", "data.stage_dir", "model.weights"]


def test_positional_paths_are_expanded() -> None:
    assert cli.parse(seeds.SeedsArguments, ["~/a", "$SCRATCH"], "x").runs == (
        Path("/my $HOME/a"),
        Path("/scratch/~/$x"),
    )
    assert cli.parse(compare.CompareArguments, ["$SCRATCH/b"], "x").runs == (Path("/scratch/~/$x/b"),)
    assert cli.parse(runs_command.RunsArguments, ["$SCRATCH/c"], "x").folder == Path("/scratch/~/$x/c")
    assert cli.parse(CompareConfig, ["~", "b"], "x") == CompareConfig(Path("/my $HOME"), Path("b"))


def test_the_configuration_file_and_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text(
        "run: {dir: ~/a, resume: ~/b.pt}\ndata: {dir: $SCRATCH, stage_dir: '${SCRATCH}/$$'}\n"
    )
    (tmp_path / "grid").write_text("--optim.lr 0.1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["--config", "~/c.yaml"], ["--config=~/c.yaml"]):
        config = cli.load_config(words)
        assert (config.run.dir, config.run.resume) == (tmp_path / "a", tmp_path / "b.pt")
        assert (config.data.dir, config.data.stage_dir) == (Path("/scratch/~/$x"), Path("/scratch/~/$x/$"))
    assert plan.parse(["~/c.yaml"]).settings == config
    assert slurm._grid(["--grid", "~/grid"]) == (["--optim.lr 0.1"], [])
    assert cli.parse(Config, ["--data.train_on", "all"], "train", config).data.dir == config.data.dir  # not once more


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("$NOT_SET/x", "there is no environment variable NOT_SET, or it is empty: $NOT_SET/x"),
        ("a/${NOT_SET}", "there is no environment variable NOT_SET"),
        ("$EMPTY/x", "there is no environment variable EMPTY"),
        ("~nobody-such/x", "there is no user nobody-such with a home directory: ~nobody-such/x"),
    ],
)
def test_what_cannot_be_expanded_is_named(word: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{stage_dir: '{word}'}}\n")
    for cls, name in ((Config, "run.dir"), (Config, "data.dir"), (Config, "data.source"), (Config, "run.resume"),
                      (prepare.PrepareConfig, "data.dir"), (lean.LeanConfig, "out")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            cli.parse(cls, [*COMMANDS[cls], f"--{name}", word], "x")
        assert str(caught.value).startswith(reason)
    for words in (["--config", str(path)], ["--config", word], ["--print-config", f"--run.dir={word}"]):
        with pytest.raises(UserError) as caught:
            cli.load_config(words)
        assert reason in str(caught.value)
    assert not Path(word).exists()


def test_names_are_no_paths() -> None:
    config = cli.load_config(["--run.name", "$NOT_SET", "--track.project", "~nobody-such"])
    assert (config.run.name, config.track.project) == ("$NOT_SET", "~nobody-such")


@pytest.mark.parametrize(
    "text",
    ["~", "~a/b", "$HOME", "$$", "a$", "${SCRATCH}", "/x/$1", "./~", "none", "null", "auto", "npm", "never", "a b"],
)
def test_config_yaml_names_the_path_that_was_used(text: str) -> None:
    """Whatever the environment is when it is read."""
    path = Path(text)
    config = Config()
    for section, key in (("run", "dir"), ("run", "resume"), ("data", "dir"), ("data", "source"), ("data", "stage_dir")):
        part = getattr(config, section)
        object.__setattr__(part, key, path)
    assert cli.from_yaml(to_yaml(config), "config.yaml") == config
    assert len(fields(config)) == len(to_plain(config))


def test_paths_on_a_real_command_line(tmp_path: Path) -> None:
    """One screen, exit code 2, and no folder named ~."""
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(runs.REPOSITORY)}
    for module, words in (
        ("prepare", ["--data.dir=$NOT_SET"]),
        ("evaluate", ["--checkpoint=~nobody-such/x"]),
        ("train", ["--run.dir=$NOT_SET/x"]),
    ):
        command = [sys.executable, "-m", f"cifar_dist.{module}", *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.startswith("error: there is no ")
        assert len(result.stderr.splitlines()) == 1
    command = [sys.executable, "-m", "cifar_dist.prepare", "--data.dir=~/cifar", "--data.source=~/none"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert f"data.source {tmp_path}/none does not exist" in result.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.tf32", "false"], False),
        (["--train.tf32", "No"], False),
        (["--train.tf32=off"], False),
        (["--train.tf32", "True"], True),
    ],
)
def test_booleans(words: list[str], expected: bool) -> None:
    assert cli.parse(Config, words, "train").train.tf32 is expected


@pytest.mark.parametrize(
    "text",
    ["tf32 maybe", "threads 1.5", "threads ten", "threads none", "max_steps nothing", "compile 5", "epochs true"],
)
def test_values_of_another_type_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--train.{text}".split()
    with pytest.raises(SystemExit) as end:
        cli.parse(Config, words, "train")
    assert end.value.code == 2
    output = capsys.readouterr().err
    assert words[0] in output
    assert words[1] in output
