"""The list of runs: running, killed, stopped, failed, finished, damaged and foreign directories, each as it is."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifar_dist import cli
from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.reports import run_state, run_table
from cifar_dist.reports.run_state import RunState, total_steps
from tests.support import runs
from tests.support.lock_holders import holder, wait_for_owner

pytestmark = pytest.mark.xdist_group("clock")
SUMMARY = {
    "test_accuracy": 0.884, "test_n": 10_000, "params": 385_290, "steps": 2_730, "images_per_second": 1_234.5,
    "train_seconds": 234.4, "world_size": 2, "seed": 0,
}  # fmt: skip
STATUS = {"status": "done", "exit_code": 0, "world_size": 2, "host": os.uname().nodename, "pid": 1, "job": None}
LINES = [
    {"step": 20, "epoch": 0.4, "train/loss": 2.0, "images_per_second": 900.0, "seconds": 10.0},
    {"step": 30, "epoch": 0.6, "val/accuracy": 0.25, "val/loss": 2.0, "val/n": 5_000},
    {"step": 40, "epoch": 0.9, "train/loss": 1.9, "images_per_second": 950.0, "seconds": 20.0},
]


def leave_run(directory: Path, summary: dict[str, Any] | None = None, **status: Any) -> Path:
    """Write the files of a run."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(Config()))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (directory / "status.json").write_text(json.dumps(STATUS | status))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def listed(folder: Path) -> dict[str, RunState]:
    """What is found, by name."""
    found = run_table.read(folder)
    return {found.name(run): run for run in found.runs}


def command(*arguments: str | Path, expected: int = 0) -> str:
    words = [sys.executable, "-X", "importtime", "-m", "cifar_dist.runs", *map(str, arguments)]
    done = subprocess.run(words, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expected, done.stderr
    assert "| torch\n" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.stdout + "\n".join(errors)


@pytest.mark.parametrize("train", [{"epochs": math.inf, "batch_size": 8}, {"max_steps": math.inf}, {"epochs": 1}, {}])
def test_steps_that_a_foreign_configuration_does_not_tell(train: dict[str, Any]) -> None:
    assert total_steps({"train": train, "data": {"train_on": "all"}}) is None


def test_every_state(tmp_path: Path) -> None:
    leave_run(tmp_path / "finished", SUMMARY)
    leave_run(tmp_path / "seeds/seed-0", SUMMARY | {"test_accuracy": 0.9})
    leave_run(tmp_path / "sweep/setting-1/seed-0", status="failed", exit_code=5, message="loss is NaN.\nSecond line.")
    leave_run(tmp_path / "stopped", status="stopped", exit_code=75, message="stopped by SIGTERM after step 41")
    leave_run(tmp_path / "killed", status="running", exit_code=None, pid=2**22 + 1, last_checkpoint_step=40)
    (leave_run(tmp_path / "of an older version") / "status.json").unlink()
    leave_run(tmp_path / "lost summary")
    (leave_run(tmp_path / "damaged", SUMMARY) / "summary.json").write_text('{"test_accuracy": 0.8')
    (leave_run(tmp_path / "damaged metrics", SUMMARY) / "metrics.jsonl").write_text("\0" * 100)
    (leave_run(tmp_path / "damaged config", SUMMARY) / "config.yaml").write_text("model: {")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    states = {name: (run.state, run.note) for name, run in listed(tmp_path).items()}
    assert states == {
        "finished": ("done", ""),
        "seeds/seed-0": ("done", ""),
        "sweep/setting-1/seed-0": ("failed", "exit code 5: loss is NaN."),
        "stopped": ("stopped", "stopped by SIGTERM after step 41"),
        "killed": ("killed", f"process {2**22 + 1} on {os.uname().nodename} is gone; last checkpoint: step 40"),
        "of an older version": ("unfinished", "no status.json; of an older version, or copied in part"),
        "lost summary": ("damaged", "summary.json is missing"),
        "damaged": ("damaged", "summary.json: Expecting ',' delimiter: line 1 column 22 (char 21)"),
        "damaged metrics": ("damaged", "metrics.jsonl: it has no line that can be read"),
        "damaged config": ("damaged", states["damaged config"][1]),
    }
    assert states["damaged config"][1].startswith("config.yaml: while parsing a flow")
    assert run_table.read(tmp_path).others == ["empty"]


def test_figures(tmp_path: Path) -> None:
    leave_run(tmp_path / "a", SUMMARY)
    leave_run(tmp_path / "b", status="stopped", world_size=4)
    done, stopped = listed(tmp_path)["a"], listed(tmp_path)["b"]
    assert (done.step, done.total_steps, done.accuracy, done.accuracy_of, done.n) == (40, 2730, 0.884, "test", 10_000)
    assert (done.images_per_second, done.seconds, done.devices) == (1_234.5, 234.4, 2)
    assert (stopped.step, stopped.total_steps) == (40, 100 * 43)
    assert (stopped.accuracy, stopped.accuracy_of, stopped.n) == (0.25, "val", 5_000)
    assert (stopped.images_per_second, stopped.seconds, stopped.devices) == (950.0, 20.0, 4)
    assert stopped.changed == pytest.approx(time.time(), abs=60)


@pytest.mark.data
@pytest.mark.run
def test_a_real_run_while_it_runs_and_after_it_was_killed(data_dir: Path, tmp_path: Path) -> None:
    process = runs.start(
        1, *runs.SHORT, "--train.max_steps", "4000", "--data.dir", data_dir, "--run.dir", tmp_path / "runs/mine"
    )
    (tmp_path / "runs/mine").mkdir(parents=True)
    runs.wait_until(lambda: len(runs.records(tmp_path / "runs/mine")) > 1, process)
    found = listed(tmp_path / "runs")["mine"]
    assert (found.state, found.total_steps, found.devices) == ("running", 4000, 1)
    assert found.note.startswith(f"process {process.pid} on ")
    assert found.step is not None
    assert found.step >= 4
    process.kill()
    process.communicate()
    assert listed(tmp_path / "runs")["mine"].state == "killed"
    assert " killed  " in command(tmp_path / "runs", "--state", "killed")
    assert " killed  " not in command(tmp_path / "runs", "--state", "running", "done")


def test_a_run_that_ends_while_it_is_looked_at(tmp_path: Path) -> None:
    """After its status was read it ends; then no process owns it."""
    files = run_state.read_files(leave_run(tmp_path / "a", status="running", exit_code=None))
    assert files is not None
    shutil.rmtree(tmp_path / "a")
    leave_run(tmp_path / "a", SUMMARY)
    assert [run.state for run in run_state.read_states([files])] == ["done"]


@pytest.mark.data
@pytest.mark.run
def test_finished_run(short_run: Path) -> None:
    found, figures = listed(short_run)["run"], runs.summary(short_run)
    assert (found.state, found.note, found.step, found.total_steps) == ("done", "", 60, 60)
    assert (found.accuracy, found.n, found.devices) == (figures["test_accuracy"], 500, 1)
    config = run_state.read_files(short_run)
    assert config is not None
    assert total_steps(config.config) == 60


def test_an_owner_without_a_status_yet(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """Of a new run, and of a stopped one that is resumed."""
    leave_run(tmp_path / "b", status="stopped")
    (tmp_path / "a").mkdir()
    for name in "ab":
        started.append(holder(tmp_path / name, 600))
        wait_for_owner(tmp_path / name, started[-1])
    assert [listed(tmp_path)[name].state for name in "ab"] == ["running", "running"]


def test_the_status_of_a_process_that_has_not_exited_yet(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """It ended its run, and uploads what is left to W&B."""
    (tmp_path / "a").mkdir()
    started.append(holder(tmp_path / "a", 600))
    wait_for_owner(tmp_path / "a", started[-1])
    shutil.copytree(leave_run(tmp_path / "b", SUMMARY, pid=started[-1].pid), tmp_path / "a", dirs_exist_ok=True)
    assert listed(tmp_path)["a"].state == "done"


def wandb_run(folder: Path) -> None:
    files = folder / "offline-run-1/files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("lr:\n  desc: null\n  value: 0.1\n")
    (files / "wandb-summary.json").write_text('{"val/accuracy": 0.5}')
    (folder / "latest-run").symlink_to("offline-run-1")


def other_program(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text("model: resnet\n")
    (folder / "status.json").write_text('{"status": "running"}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    (folder / "checkpoints").mkdir()


def nested_brackets(folder: Path) -> None:
    """Which crash libyaml."""
    folder.mkdir()
    (folder / "config.yaml").write_text("[" * 90_000)


def broken_link(folder: Path) -> None:
    folder.symlink_to("nowhere")


def link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder.name)


@pytest.mark.parametrize("make", [wandb_run, other_program, nested_brackets, broken_link, link_to_itself, Path.mkdir])
def test_what_is_no_run(make: Callable[[Path], None], tmp_path: Path) -> None:
    leave_run(tmp_path / "mine", SUMMARY)
    make(tmp_path / "other")
    found = run_table.read(tmp_path)
    assert [found.name(run) for run in found.runs] == ["mine"]
    assert found.others == (["other"] if (tmp_path / "other").exists() else [])
    if found.others:
        assert run_table.table(found).endswith("\n\n1 other folder without a run of this project: other")


def test_a_number_of_400_digits_costs_only_its_run(tmp_path: Path) -> None:
    leave_run(tmp_path / "mine", SUMMARY)
    leave_run(tmp_path / "odd", SUMMARY | {"train_seconds": 10**400})
    assert run_table.table(run_table.read(tmp_path)).count("done") == 2


def a_pipe(path: Path) -> None:
    """Which would wait for a writer."""
    os.mkfifo(path)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20_000_000)


@pytest.mark.parametrize(
    ("make", "state", "note"),
    [
        (a_pipe, "unreadable", "it is no file"),
        (Path.mkdir, "unreadable", "Is a directory"),
        (link_to_itself, "unreadable", "Too many levels of symbolic links"),
        (large, "damaged", "it has more than 10,000,000 bytes"),
        (lambda path: path.write_text("[" * 90_000), "damaged", None),
        (lambda path: path.write_text("7"), "damaged", None),
        (lambda path: path.write_bytes(b"\xff\xfe"), "damaged", None),
    ],
)
@pytest.mark.parametrize("name", ["config.yaml", "status.json", "summary.json"])
def test_files_that_are_none(name: str, make: Callable[[Path], object], state: str, note: str, tmp_path: Path) -> None:
    (leave_run(tmp_path / "mine", SUMMARY) / name).unlink()
    make(tmp_path / "mine" / name)
    found = listed(tmp_path)["mine"]
    assert found.state == state
    assert found.note == f"{name}: {note}" if note else found.note.startswith(f"{name}: ")


def test_odd_values(tmp_path: Path) -> None:
    """NaN, texts for numbers, and nothing at all."""
    leave_run(tmp_path / "nan", SUMMARY | {"test_accuracy": float("nan"), "train_seconds": float("nan")})
    odd = dict.fromkeys(SUMMARY, "text")
    leave_run(tmp_path / "text", odd, status=7, exit_code=[], message={"a": 1}, host=None)
    leave_run(tmp_path / "known", SUMMARY)
    leave_run(tmp_path / "null", dict.fromkeys(SUMMARY))
    (tmp_path / "null/config.yaml").write_text("model: null\ntrain: [1]\noptim: 3\ndata: x\n")
    (tmp_path / "null/metrics.jsonl").write_text('{"step": 3, "val/accuracy": "nan"}\n{"step": 4, "val')
    found = run_table.read(tmp_path)
    for descending in (False, True):
        for column in run_table.Column.__args__:  # type: ignore[attr-defined]
            assert len(run_table.sort(found, column, descending).runs) == 4
        assert found.name(run_table.sort(found, "accuracy", descending).runs[0]) == "known"
    for form in ("table", "csv", "jsonl"):
        assert "nan" in run_table.as_text(found, form)
    by_name = {line["name"]: line for line in run_table.records(found)}
    assert by_name["nan"]["accuracy"] == "nan"
    assert (by_name["text"]["accuracy"], by_name["text"]["step"]) == (None, 40)
    assert (by_name["null"]["step"], by_name["null"]["total_steps"]) == (3, None)


def test_a_large_metrics_file_is_read_at_its_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further back for a validation, but not through the whole file."""
    path = leave_run(tmp_path / "mine", status="stopped") / "metrics.jsonl"
    line = json.dumps(LINES[0]) + "\n"
    with path.open("w") as file:
        file.write(line * 100_000 + json.dumps(LINES[1]) + "\n" + line * 5_000 + '{"step": 50, "train/lo')
    read = list[int]()
    real = run_state._read

    def counting(path: Path, num_bytes: int) -> tuple[bytes, bool, float]:
        found = real(path, num_bytes)
        read.append(len(found[0]))
        return found

    monkeypatch.setattr(run_state, "_read", counting)
    found = listed(tmp_path)["mine"]
    assert (found.step, found.accuracy) == (20, 0.25)
    assert sum(read) < 1.2e6 < path.stat().st_size / 5


def test_links_and_loops(tmp_path: Path) -> None:
    """Each run counts once; a run elsewhere is found by a link."""
    leave_run(tmp_path / "elsewhere/mine", SUMMARY)
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere/mine")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere/mine")
    (folder / "loop").symlink_to(folder)
    found = run_table.read(folder)
    assert ([found.name(run) for run in found.runs], found.others) == (["linked"], [])


def test_folders_inside_runs_hidden_ones_and_deep_ones_are_left_out(tmp_path: Path) -> None:
    leave_run(tmp_path / "mine", SUMMARY)
    leave_run(tmp_path / "mine/inside", SUMMARY)
    leave_run(tmp_path / ".hidden/mine", SUMMARY)
    leave_run(tmp_path / "1/2/3/4", SUMMARY)
    leave_run(tmp_path / "1/2/3/b/5", SUMMARY)
    assert sorted(listed(tmp_path)) == ["1/2/3/4", "mine"]


def test_names(tmp_path: Path) -> None:
    """On one line each, in columns, whatever their characters."""
    for name in (b"plain", "模型".encode(), b"new\nline", b"\xff\x1b[31m", "e\u0301".encode()):
        leave_run(tmp_path / os.fsdecode(name), SUMMARY)
    lines = run_table.table(run_table.sort(run_table.read(tmp_path), "name", False)).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["\\udcff\\x1b[31m", "e\u0301", "new\\nline", "plain", "模型"]
    assert len({cli.display_width(line) for line in lines}) == 1
    assert lines[-1].startswith("模型" + " " * 10 + "   done ")  # as wide as four letters, of 14
    assert command(tmp_path, "--format", "jsonl").count("\n") == 5


def test_table(tmp_path: Path) -> None:
    leave_run(tmp_path / "exp/seed-0", SUMMARY)
    leave_run(tmp_path / "inception_v1-seed0", status="failed", exit_code=2, message="x" * 500)
    lines = command(tmp_path, "--sort", "accuracy").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["name", "state", "step", "accuracy", "n", "images/s", "time", "devices", "changed"]
    values = ["failed", "40/4300", "val", "25.00%", "5,000", "950", "0:00:20", "2"]
    assert lines[1].split()[:-2] == ["inception_v1-seed0", *values]
    values = ["done", "40/2730", "test", "88.40%", "10,000", "1,234", "0:03:54", "2"]
    assert lines[2].split()[:-2] == ["exp/seed-0", *values]
    assert lines[4] == f"inception_v1-seed0: exit code 2: {'x' * 500}"[:97] + "..."
    other = command(tmp_path, "--sort", "accuracy", "--descending", "True").splitlines()
    assert (other[1], other[2]) == (lines[2], lines[1])


def test_formats(tmp_path: Path) -> None:
    leave_run(tmp_path / "a, b", SUMMARY)
    line = json.loads(command(tmp_path, "--format", "jsonl"))
    row = next(csv.DictReader(io.StringIO(command(tmp_path, "--format", "csv"))))
    assert row == {name: "" if value is None else str(value) for name, value in line.items()}
    assert (row["name"], line["accuracy"], line["total_steps"]) == ("a, b", 0.884, 2730)


def test_folders_that_cannot_be_listed(tmp_path: Path) -> None:
    assert f"{tmp_path}/none is no folder" in command(tmp_path / "none", expected=2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        run_table.read(tmp_path / "file")
    assert command(tmp_path).startswith(f"no runs in {tmp_path}")
    assert command(tmp_path, "--format", "csv") == ""


def test_runs_that_vanish_or_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        leave_run(tmp_path / name, SUMMARY)
    real = run_state.read_files

    def fails(directory: Path) -> object:
        if directory.name == "a":
            shutil.rmtree(directory)
        if directory.name == "b":
            raise PermissionError(13, "Permission denied")
        return real(directory)

    monkeypatch.setattr(run_table, "read_files", fails)
    found = {name: (run.state, run.note) for name, run in listed(tmp_path).items()}
    assert found == {"b": ("unreadable", "Permission denied"), "c": ("done", "")}


def test_thousands_of_runs(tmp_path: Path) -> None:
    first = leave_run(tmp_path / "0", SUMMARY)
    for number in range(1, 1000):
        shutil.copytree(first, tmp_path / str(number))
    began = time.process_time()
    assert len(listed(tmp_path)) == 1000
    assert time.process_time() - began < 15
