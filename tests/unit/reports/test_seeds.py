"""Mean, standard deviation and interval over seeds; refused runs; and launch/seeds as a user runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_dist import seeds as command
from cifar_dist.config import Config, EvalConfig, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.reports.finished_runs import FIGURES, refuse_other_settings
from cifar_dist.reports.seeds import Spread, spread
from cifar_dist.training.checkpoint import all_steps
from tests.scripts.test_launch import TINY, start
from tests.support import runs

CONFIG = Config(eval=EvalConfig(tta="flip"))
FIGURES_OF_A_RUN = {
    "val_accuracy": 0.85, "val_n": 5000, "test_accuracy": 0.86, "test_accuracy_tta": 0.87, "test_n": 10_000,
    "train_n": 45_000, "train_seconds": 100.0, "first_step_seconds": 20.0, "images_per_second": 27_000.0, "steps": 2580,
    "epochs": 60.0, "batch_size": 1024, "micro_batch_size": 128, "params": 5_000_000, "precision": "bf16",
    "git_commit": "0123456789abcdef-dirty", "data_receipt": ["aa", "bb"], "world_size": 2, "device_names": ["a", "a"],
    "versions": {"torch": "2.15.0"}, "command": "python -m cifar_dist.train",
}  # fmt: skip


def leave_run(folder: Path, seed: int, config: Config = CONFIG, /, **figures: Any) -> Path:
    """Write the files of a finished run, with these figures."""
    directory = folder / f"seed-{seed}"
    directory.mkdir(parents=True)
    config = replace(config, run=replace(config.run, seed=seed, dir=directory))
    (directory / "config.yaml").write_text(to_yaml(config))
    values = FIGURES_OF_A_RUN | {"seed": seed, "model_sha256": f"model {seed}"} | figures
    (directory / "summary.json").write_text(json.dumps(values))
    return directory


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["seeds", *map(str, arguments)])
    command.main()


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message with which the command refuses `arguments`."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 20
    return captured.err


# By hand, with Student's t from a printed table: 12.7062 (1 degree of freedom), 4.30265 (2) and 2.77645 (4).
@pytest.mark.parametrize(
    ("values", "mean", "deviation", "half"),
    [
        ([0.86, 0.88], 0.87, 0.0141421, 0.127062),
        ([0.1, 0.2, 0.3], 0.2, 0.1, 0.248414),
        ([0.83, 0.81, 0.85, 0.82, 0.84], 0.83, 0.0158114, 0.0196324),
    ],
)
def test_spread_by_hand(values: list[float], mean: float, deviation: float, half: float) -> None:
    got = spread(values)
    assert got.interval_95 is not None
    assert got.mean == pytest.approx(mean, rel=1e-12)
    assert got.standard_deviation == pytest.approx(deviation, rel=5e-6)
    assert got.interval_95 == pytest.approx((mean - half, mean + half), rel=5e-6)


def test_one_run_has_no_spread() -> None:
    assert spread([0.5]) == Spread(0.5, None, None)


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "exp"
    leave_run(folder, 10, test_accuracy=0.86, val_accuracy=0.85)
    others = {"train_seconds": 120.0, "first_step_seconds": 30.0}
    leave_run(folder, 2, test_accuracy=0.88, val_accuracy=0.87, **others)  # before 10: by number, not by name
    call(monkeypatch, folder, "--json", tmp_path / "out.json")
    lines = capsys.readouterr().out.splitlines()
    assert "test accuracy, last epoch, n = 10,000 images, TTA: flip; validation accuracy: n = 5,000" in lines[1]
    assert lines[2] == "on 2 x a; torch 2.15.0"
    rows = [line.split() for line in lines[5:]]
    assert rows[0] == ["seed", "2", "87.00", "88.00", "87.00", "120.0", "27,000", "0123456-dirty"]
    assert rows[1][:4] == ["seed", "10", "85.00", "86.00"]
    assert rows[3][:3] == ["mean", "86.00", "87.00"]
    assert rows[4][:4] == ["standard", "deviation", "1.41", "1.41"]
    assert rows[5][-5:-2] == ["73.29..98.71", "74.29..99.71", "87.00..87.00"]
    times, accuracies = "110.0 s +- 14.1 | 135.0 s +- 21.2", "87.00 % +- 1.41 (74.29 to 99.71 %)"
    row = f"| inception_v1, 5,000,000 parameters | 2 | {times} | {accuracies} | 87.00 % +- 0.00 (87.00 to 87.00 %) |"
    assert lines[-4:-1] == ["|---|---|---|---|---|---|", row, ""]
    assert lines[-5].endswith("| test accuracy | test accuracy, TTA flip |")
    assert lines[-1].startswith("Mean +- standard deviation over seeds 2, 10 (95 % interval of the mean). Accuracy: ")
    assert "2,580 steps of 1024 images, 60 epochs of 45,000 images, in bf16. Preparation" in lines[-1]
    assert lines[-1].endswith(" On 2 x a; torch 2.15.0; commit 0123456-dirty.")

    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["test_accuracy"]["mean"] == pytest.approx(0.87)
    assert figures["test_accuracy"]["interval_95"] == pytest.approx([0.742938, 0.997062], abs=1e-6)
    assert figures["test_accuracy_tta"] == {
        "mean": 0.87, "standard_deviation": 0.0, "interval_95": [0.87, 0.87]
    }  # fmt: skip
    assert (figures["num_runs"], figures["test_n"], figures["val_n"]) == (2, 10_000, 5000)
    assert figures["t_quantile"] == pytest.approx(12.7062, rel=1e-5)
    assert figures["config"]["optim.lr"] == CONFIG.optim.lr
    assert "run.seed" not in figures["config"]
    assert [run["seed"] for run in figures["runs"]] == [2, 10]
    for run in figures["runs"]:
        assert run.keys() == {"summary", *FIGURES}
        assert json.loads(Path(run["summary"]).read_text())["model_sha256"] == run["model_sha256"]
    assert [path.name for path in tmp_path.iterdir()] in (["exp", "out.json"], ["out.json", "exp"])


def test_one_run_without_validation_and_tta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, data=replace(CONFIG.data, train_on="all"), eval=replace(CONFIG.eval, tta="none"))
    run = leave_run(tmp_path, 3, config, val_accuracy=None, val_n=None, test_accuracy_tta=None, git_commit=None)
    call(monkeypatch, run / "summary.json", "--json", tmp_path / "out.json")
    output = capsys.readouterr().out
    assert "validation accuracy: none, trained on all" in output
    assert "need n > 1 runs" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["seed", "3", "-", "86.00", "-", "100.0", "27,000", "-"] in rows
    assert ["mean", "-", "86.00", "-", "100.0", "27,000"] in rows
    assert ["standard", "deviation", *"-----"] in rows
    assert "\n| inception_v1, 5,000,000 parameters | 1 | 100.0 s | 120.0 s | 86.00 % |\n\nSeed 3. Accuracy: " in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["val_accuracy"] is figures["test_accuracy_tta"] is figures["t_quantile"] is None
    assert figures["test_accuracy"] == {"mean": 0.86, "standard_deviation": None, "interval_95": None}


def test_paths_with_a_dollar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line $ is written $$; the paths of the runs found there are not expanded again."""
    run = leave_run(tmp_path / "a$b", 0)
    call(monkeypatch, tmp_path / "a$$b")
    assert "1 run: " in capsys.readouterr().out
    refuse_other_settings([run], CONFIG)


def test_devices_and_commits_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(CONFIG, data=replace(CONFIG.data, dir=Path("/elsewhere")))
    other = replace(other, track=replace(CONFIG.track, wandb="disabled", group="g", tags="a", tensorboard=True))
    leave_run(tmp_path, 0)
    leave_run(tmp_path, 1, other, git_commit="fedcba9876543210", device_names=["b", "b"])
    call(monkeypatch, tmp_path, "--json", tmp_path / "out.json")
    output = capsys.readouterr().out
    assert ["mean", "85.00", "86.00", "87.00", "-", "-"] in [line.split() for line in output.splitlines()]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["train_seconds"] is figures["images_per_second"] is None
    assert "on 2 x a; torch 2.15.0, and on 2 x b; torch 2.15.0" in output
    assert "0123456-dirty\n" in output
    assert "fedcba9\n" in output
    # For a README, times of different machines have no mean.
    assert "\n| inception_v1, 5,000,000 parameters | 2 | - | - | 86.00 % +- 0.00 (86.00 to 86.00 %) |" in output
    assert output.endswith(" On 2 x a; torch 2.15.0 and on 2 x b; torch 2.15.0; commit 0123456-dirty, fedcba9.\n")


def test_scored_again_and_with_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that trains no step, as every step was done, has no first step."""
    config = replace(CONFIG, model=replace(CONFIG.model, weights=Path("a.safetensors")))
    config = replace(config, optim=replace(config.optim, ema_decay=0.99))
    call(monkeypatch, leave_run(tmp_path, 0, config, first_step_seconds=None))
    output = capsys.readouterr().out
    assert "| 100.0 s | - |" in output
    assert "images, in bf16, started from a.safetensors, scored with averaged weights. Preparation" in output


def test_settings_that_are_paths_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, weights=Path("a.pt")))
    call(monkeypatch, leave_run(tmp_path / "runs", 0, config), "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["config"]["model.weights"] == "a.pt"


def test_missing_and_unfinished_runs_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(tmp_path, 0)
    for seed in (1, 2):
        (leave_run(tmp_path, seed) / "summary.json").unlink()
    message = refusal(monkeypatch, capsys, tmp_path, tmp_path / "seed-7")
    for name in ("seed-1", "seed-2"):
        assert f"{name} holds no finished run: no summary.json. Resume the run with --run.resume auto." in message
    assert "seed-7 does not exist" in message
    (tmp_path / "file").touch()
    assert "file is no folder" in refusal(monkeypatch, capsys, tmp_path / "file")
    assert "cannot be read: File name too long" in refusal(monkeypatch, capsys, tmp_path / ("x" * 300))
    assert "seed-0" not in message
    (tmp_path / "empty").mkdir()
    assert "empty holds no run." in refusal(monkeypatch, capsys, tmp_path / "seed-0" / "..", tmp_path / "empty")
    assert "no run is given" in refusal(monkeypatch, capsys)


@pytest.mark.parametrize("name", ["", "config.yaml"])
def test_a_run_that_cannot_be_read_is_not_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link to itself fails for root, too."""
    for seed in (0, 1):
        path = leave_run(tmp_path, seed) / name
    path.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    path.symlink_to(path)
    message = refusal(monkeypatch, capsys, tmp_path)
    assert f"{tmp_path / 'seed-1'} cannot be read: Too many levels of symbolic links." in message
    assert "Remove" not in message


def test_a_summary_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_run(tmp_path, 0) / "summary.json"
    path.unlink()
    path.mkdir()
    assert refusal(monkeypatch, capsys, tmp_path) == f"error: {path} cannot be read: Is a directory.\n"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is damaged"),
        ('{"seed": 0, ', "is damaged"),
        ("[1, 2]", "seed is None, not 0"),
        ("{}", "seed is None, not 0"),
        ("\udcff", "is damaged"),
    ],
)
def test_damaged_summaries_are_refused(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_run(tmp_path, 0) / "summary.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(monkeypatch, capsys, tmp_path)
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(
    ("figures", "part"),
    [
        ({"test_accuracy": 86.0}, "test_accuracy is 86.0"),
        ({"test_accuracy": None}, "test_accuracy is None"),
        ({"test_accuracy": True}, "test_accuracy is True"),
        ({"test_accuracy": "0.86"}, "test_accuracy is 0.86"),
        ({"test_accuracy": math.nan}, "test_accuracy is nan"),
        ({"train_seconds": math.inf}, "train_seconds is inf"),
        ({"steps": 1e4}, "steps is 10000.0"),
        ({"train_seconds": -1.0}, "train_seconds is -1.0"),
        ({"seed": 5}, "seed is 5, not 0"),
        ({"batch_size": 512}, "batch_size is 512, not 1024"),
        ({"test_n": 500}, "of a trial with eval.test_subset: test_n is 500, not 10000."),
        ({"device_names": [1]}, "device_names is [1]"),
        ({"device_names": [["x"]]}, "device_names is [['x']]"),
        ({"test_accuracy_tta": None}, "test_accuracy_tta is None"),
        ({"val_accuracy": None, "val_n": None}, "val_accuracy is None"),
    ],
)
def test_impossible_figures_are_refused(
    figures: dict[str, Any],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave_run(tmp_path, 0, **figures)
    assert part in refusal(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("text", ["{", "run: [", "nonsense: {}", "optim: {lr: fast}", None])
def test_damaged_configs_are_refused(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_run(tmp_path, 0) / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    assert str(path) in refusal(monkeypatch, capsys, tmp_path)


def test_runs_that_differ_in_more_than_the_seed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(tmp_path, 0)
    leave_run(tmp_path, 1, replace(CONFIG, optim=replace(CONFIG.optim, lr=0.5), model=replace(CONFIG.model, width=0.5)))
    message = refusal(monkeypatch, capsys, tmp_path)
    assert "optim.lr: 0.05 and 0.5" in message
    assert "model.width: 1.0 and 0.5" in message


@pytest.mark.parametrize(
    ("figures", "part"),
    [
        ({"val_n": 4_000}, "val_n is 5000 and 4000"),
        ({"precision": "fp32"}, "precision is bf16 and fp32"),
        ({"weights_sha256": "ab"}, "weights_sha256 is None and ab"),
        ({"model_sha256": "model 0"}, "copy"),
    ],
)
def test_runs_with_unequal_work_are_refused(
    figures: dict[str, Any],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave_run(tmp_path, 0)
    leave_run(tmp_path, 1, **figures)
    assert part in refusal(monkeypatch, capsys, tmp_path)


def test_a_seed_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(tmp_path / "a", 0)
    leave_run(tmp_path / "b", 0, model_sha256="another")
    assert "both have seed 0" in refusal(monkeypatch, capsys, tmp_path / "a", tmp_path / "b")


def test_directories_with_other_settings_are_refused(tmp_path: Path) -> None:
    finished, begun = leave_run(tmp_path, 0), leave_run(tmp_path, 1)
    (begun / "summary.json").unlink()
    (tmp_path / "seed-3/checkpoints").mkdir(parents=True)  # of a run that was refused
    refuse_other_settings((finished, begun, tmp_path / "seed-2", tmp_path / "seed-3"), CONFIG)
    (tmp_path / "seed-3/checkpoints/step-00000005.pt").touch()
    with pytest.raises(UserError, match=r"seed-3/config\.yaml: No such file"):
        refuse_other_settings([tmp_path / "seed-3"], CONFIG)
    with pytest.raises(UserError, match=r"eval\.test_subset is for trials"):
        refuse_other_settings([tmp_path / "seed-2"], replace(CONFIG, eval=replace(CONFIG.eval, test_subset=500)))
    other = replace(CONFIG, eval=replace(CONFIG.eval, tta="none"))
    for directory in (finished, begun):
        with pytest.raises(UserError, match=r"eval\.tta: flip and none"):
            refuse_other_settings([directory], other)


def test_json_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(tmp_path / "exp", 0)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, tmp_path / "exp", "--json", tmp_path / "nowhere" / "out.json")
    assert end.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_no_torch_is_imported() -> None:
    code = "import sys, cifar_dist.seeds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.REPOSITORY, check=False).returncode == 0


@pytest.mark.run
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("configs/quickstart.yaml",), "launch/seeds CONFIG N"),
        (("configs/quickstart.yaml", "0"), "seeds is 0; valid: 1 to 9999"),
        (("configs/quickstart.yaml", "two"), "'two' is no whole number"),
        (("--run.name", "x"), "CONFIG"),
        (("configs/quickstart.yaml", "2", "--run.seed", "4"), "--first-seed"),
        (("configs/quickstart.yaml", "2", "--first-seed=-1"), "first_seed is -1; valid: 0 to"),
        (("configs/quickstart.yaml", "2", "--run.resume=never"), "--run.resume is set for each run"),
        (("configs/quickstart.yaml", "2", "--run.name", "a/b"), "a name without /"),
        (("configs/quickstart.yaml", "2", "--run.name"), "--run.name"),
        (("configs/nowhere.yaml", "2"), "nowhere.yaml"),
        (("configs/quickstart.yaml", "2", "--optim.lrr", "1"), "optim.lr"),
    ],
)
def test_wrong_arguments_are_refused_before_training(arguments: tuple[str, ...], part: str) -> None:
    assert part in runs.finish(start("seeds", *arguments), expected=2)


@pytest.mark.run
@pytest.mark.data
@pytest.mark.timeout(600)  # three trainings one after another, on a machine that may be busy
def test_stopped_and_gone_on(data_dir: Path, tmp_path: Path) -> None:
    """Two seeds: stopped during the first, resumed to the end, repeated, and repeated with another setting."""
    folder = tmp_path / "my runs"
    arguments = (*TINY[1:2], "2", *TINY[2:], "--train.max_steps", "6", "--train.checkpoint_every_steps", "1",
                 "--data.dir", data_dir, "--run.dir", folder)  # fmt: skip
    process = start("seeds", *arguments, cpu=runs.ON_ONE_CPU[-1], NPROC_PER_NODE="1")
    while not all_steps(folder / "seed-0/checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.terminate()
    assert "stopped; the same command" in runs.finish(process, expected=143)
    assert runs.children_with(str(folder)) == []
    assert not (folder / "seed-0/summary.json").exists()

    output = runs.finish(start("seeds", *arguments, cpu=runs.ON_ONE_CPU[-1], NPROC_PER_NODE="1"), timeout_s=400)
    assert f"resuming from {folder}/seed-0/checkpoints/step-" in output
    assert "2 runs that differ only in the seed" in output
    assert "Student's t" in output
    summaries = [runs.summary(folder / f"seed-{seed}") for seed in (0, 1)]
    assert [(s["seed"], s["steps"], s["world_size"]) for s in summaries] == [(0, 6, 1), (1, 6, 1)]
    figures = json.loads((folder / "seeds.json").read_text())
    accuracies = [s["test_accuracy"] for s in summaries]
    assert figures["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert [run["model_sha256"] for run in figures["runs"]] == [s["model_sha256"] for s in summaries]
    assert yaml.safe_load((folder / "seed-1/config.yaml").read_text())["run"]["name"] == "quickstart-seeds-seed-1"

    before = times_of(folder)
    again = runs.finish(start("seeds", *arguments))
    assert [f"seed {seed} is complete" in again for seed in (0, 1)] == [True, True]
    assert again.splitlines()[-17:] == output.splitlines()[-17:]
    assert times_of(folder) == before

    refused = runs.finish(start("seeds", *arguments, "--eval.tta", "flip"), expected=2)
    assert "eval.tta: none and flip" in refused
    assert times_of(folder) == before


def times_of(folder: Path) -> dict[Path, int]:
    """When each file of the runs was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/**/*") if path.is_file()}
