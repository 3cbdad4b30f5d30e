"""Stop signals in whole runs: checkpoints, messages, and no process left behind."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifar_dist.cluster.restarts import failure_code
from cifar_dist.training.checkpoint import all_steps
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.xdist_group("clock")]
NUM_STEPS = 100
OPTIONS = (*runs.TWO_RANKS, "--train.checkpoint_every_steps", "0")


def launch(*arguments: str | Path, restarts: int = 0) -> subprocess.Popen[str]:
    """Two ranks as launch/node starts them."""
    command = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "cifar_dist.train"]
    return runs.start_command([*command, *map(str, arguments)])


def validations(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in runs.records(run_dir) if "val/accuracy" in record]


def catches(pid: int) -> bool:
    """Whether that process handles SIGUSR1 by now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask >> (signal.SIGUSR1 - 1) & 1)


def status(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return values


def stop(
    data_dir: Path, run_dir: Path, number: signal.Signals, to: str, expected: int, restarts: int = 0
) -> tuple[str, int | None]:
    """Train from where `run_dir` is until `number` comes after a log line; the output, and the step saved last.

    The signal comes twice, as when Slurm and torchrun both send it; afterwards no process of the run is left.
    """
    logged = len(runs.logged_steps(run_dir))
    process = launch(*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir, restarts=restarts)
    runs.wait_until(lambda: len(runs.logged_steps(run_dir)) > logged, process)
    assert status(run_dir)["status"] == "running"
    asked_at = time.monotonic()
    pid = process.pid if to == "launcher" else runs.workers_of(process, run_dir)[-1]
    os.kill(pid, number)
    if number != signal.SIGKILL:
        time.sleep(0.05)
        os.kill(pid, number)
    output = runs.finish(process, expected=expected)
    assert time.monotonic() - asked_at < 20
    assert "restarting from" not in output
    assert runs.children_with(str(run_dir)) == []
    assert not (run_dir / "summary.json").exists()
    return output, max(all_steps(run_dir / "checkpoints"), default=None)


def test_run_stopped_repeatedly_ends_with_the_same_bits(two_ranks: Path, data_dir: Path, tmp_path: Path) -> None:
    """By each signal, to the launcher or to one rank, which is no failure to restart after; and by a killed rank."""
    run_dir, before = tmp_path / "run", 0
    for number, to, restarts in (
        (signal.SIGUSR1, "launcher", 0), (signal.SIGINT, "launcher", 0), (signal.SIGTERM, "one rank", 2)
    ):  # fmt: skip
        output, step = stop(data_dir, run_dir, number, to, 75, restarts)
        assert step is not None
        assert before < step < NUM_STEPS
        said = re.findall(r"stopped by (\w+) after step (\d+), which is saved", output)
        passed_on = signal.SIGTERM if number == signal.SIGINT else number
        assert said == [(passed_on.name, str(step))]
        assert output.count("resuming from") == (before > 0)
        assert "Traceback" not in output
        found = status(run_dir)
        assert (found["status"], found["exit_code"], found["last_checkpoint_step"]) == ("stopped", 75, step)
        before = step
    output, step = stop(data_dir, run_dir, signal.SIGKILL, "one rank", 6)
    assert "was killed by SIGKILL" in output
    assert step == before
    runs.assert_loads_as_evaluated(run_dir, data_dir)

    output = runs.finish(launch(*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir))
    assert f"step-{before:08d}.pt" in output
    runs.assert_same(run_dir, two_ranks)
    assert status(run_dir)["status"] == "done"


def test_ranks_that_cannot_save(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are killed in the end. Code 75 would say that the state is saved, and Slurm's script would requeue."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    process = launch(*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), process)
    for pid in runs.workers_of(process, tmp_path):
        os.kill(pid, signal.SIGSTOP)
    process.terminate()
    output = runs.finish(process, expected=6)
    assert "error: 2 of the processes on " in output
    assert " did not stop within 2 s after SIGTERM and were killed.\n" in output
    assert not all_steps(tmp_path / "checkpoints")


@pytest.mark.slow
def test_stopped_where_a_validation_is_due(data_dir: Path, tmp_path: Path) -> None:
    """Every step is an epoch with a validation; the one that was due is done when the run resumes."""
    options = (*runs.SMALL, "--data.train_on", "train", "--data.subset", "96", "--train.max_steps", "3",
               "--eval.every_epochs", "1", "--train.log_every_steps", "1", "--data.dir", data_dir,
               "--train.precision", "fp32", "--run.resume", "auto")  # fmt: skip
    runs.run(1, *options, "--run.dir", tmp_path / "whole")
    run_dir = tmp_path / "stopped"
    process = runs.start(1, *options, "--run.dir", run_dir)
    runs.wait_until(lambda: validations(run_dir), process)
    process.send_signal(signal.SIGTERM)
    assert "which is saved" in runs.finish(process, expected=75)
    step = all_steps(run_dir / "checkpoints")[-1]
    assert [record["step"] for record in validations(run_dir)][-1] == step - 1
    runs.run(1, *options, "--run.dir", run_dir)
    assert validations(run_dir) == validations(tmp_path / "whole")
    assert runs.summary(run_dir)["model_sha256"] == runs.summary(tmp_path / "whole")["model_sha256"]
    runs.assert_loads_as_evaluated(run_dir, data_dir, "best")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1, signal.SIGINT,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)),
    ],
)  # fmt: skip
def test_before_the_first_step(number: signal.Signals, data_dir: Path, tmp_path: Path) -> None:
    """In the phases of the start: imports of the launcher, imports of the workers, the rendezvous."""
    moments: list[tuple[str, Callable[[subprocess.Popen[str], Path], Any]]] = [
        ("imports", lambda process, _: catches(process.pid)),
        ("workers", runs.workers_of),
        ("two workers listen", lambda process, run_dir: sum(map(catches, runs.workers_of(process, run_dir))) == 2),
    ]
    for name, reached in moments:
        run_dir = tmp_path / name
        process = launch(*OPTIONS, "--train.max_steps", "4000", "--data.dir", data_dir, "--run.dir", run_dir)
        runs.wait_until(functools.partial(reached, process, run_dir), process)
        os.kill(process.pid, number)
        asked_at = time.monotonic()
        output = runs.finish(process, expected=75)
        assert time.monotonic() - asked_at < 20
        assert "Traceback" not in output
        assert runs.children_with(str(run_dir)) == []


def test_killed_launcher_leaves_no_worker(data_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launch(*OPTIONS, "--train.max_steps", "4000", "--data.dir", data_dir, "--run.dir", run_dir)
    runs.wait_until(lambda: runs.logged_steps(run_dir), process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 25
    while runs.children_with(str(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(all_steps(run_dir / "checkpoints")) == 1
    assert status(run_dir)["status"] == "stopped"


def test_interrupt_of_one_process(data_dir: Path, tmp_path: Path) -> None:
    process = runs.start(1, *OPTIONS, "--train.max_steps", "4000", "--data.dir", data_dir, "--run.dir", tmp_path)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), process)
    process.send_signal(signal.SIGINT)
    output = runs.finish(process, expected=75)
    assert "Ctrl-C again exits at once" in output
    assert "stopped by SIGINT after step" in output
    assert status(tmp_path)["exit_code"] == 75


def test_second_interrupt_leaves_at_once(data_dir: Path, tmp_path: Path) -> None:
    """With a rank that stands still, so that the first leads to nothing."""
    process = launch(*OPTIONS, "--train.max_steps", "4000", "--data.dir", data_dir, "--run.dir", tmp_path)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), process)
    os.kill(runs.workers_of(process, tmp_path)[-1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # of the same keystroke
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    runs.finish(process, expected=130, timeout_s=5)
    assert runs.children_with(str(tmp_path)) == []


def test_codes_of_failures(data_dir: Path, tmp_path: Path) -> None:
    """Torchrun's own is always 1. For a loss that explodes see test_elastic, for a killed rank above."""
    common = (*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path / "run")
    mistaken = launch(*common, "--train.micro_batch_size", "50")
    lost = launch(*common, "--run.resume", str(tmp_path / "none.pt"))
    assert "no multiple" in runs.finish(mistaken, expected=2)
    assert "none.pt" in runs.finish(lost, expected=4)


@pytest.mark.parametrize(
    ("failures", "left", "code"),
    [
        ([75, 75], {75}, 75),
        ([75], {75, 6}, 75),
        ([-9], {6}, 6),
        ([-9], {6, 75}, 6),
        ([1], {1, 75}, 1),
        ([6], {6, 5}, 5),
        ([2], {2}, 2),
        ([3], {3, 2}, 3),
        ([6, 6], {6}, 6),
        ([], {0}, 0),
        ([], set(), 0),
    ],
)
def test_most_informative_exit_code(failures: list[int], left: set[int], code: int) -> None:
    assert failure_code(failures, left) == code


STOPS_LATE = """
import os, signal, threading, time
from pathlib import Path
from cifar_dist.training.trainer import Hooks

class Late(Hooks):
    def log_metrics(self, step, metrics):
        if "test/n" in metrics:
            threading.Thread(target=self.stop, daemon=True).start()

    def stop(self):
        while not Path("late/summary.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_after_the_results_changes_nothing(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    """The run is complete by then, and a resume would not write its pictures and its report again."""
    (tmp_path / "stops_late.py").write_text(STOPS_LATE)
    options = (*runs.SMALL, "--data.dir", data_dir, "--run.dir", "late", "--run.hooks", "stops_late:Late")
    runs.finish(runs.start(world_size, *options, cwd=tmp_path))
    assert status(tmp_path / "late")["status"] == "done"
    names = {path.name for path in (tmp_path / "late").iterdir()}
    assert names >= {"curves.png", "predictions.csv", "mistakes.png", "filters.png", "report.html"}
