"""Promises 5 and 6 in whole runs: a run that is killed at any moment resumes to the same weights, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cifar_dist.training.checkpoint import all_steps, path_of
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
# Three ranks: the rounding of a float sum would depend on how it is grouped, unlike for two. Batches that do not divide
# an epoch, and checkpoints that do not divide it either.
WORLD_SIZE = 3
OPTIONS = (*runs.SMALL, "--data.subset", "1000", "--train.precision", "fp32", "--train.max_steps", "36",
           "--model.auxiliary", "True", "--model.stem", "whiten", "--model.dropout", "0.2", "--optim.name", "muon",
           "--optim.ema_decay", "0.9", "--train.checkpoint_every_steps", "4",
           "--train.log_every_steps", "3", "--train.keep_checkpoints", "3")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs.run(WORLD_SIZE, *OPTIONS, "--data.dir", data_dir, "--run.dir", folder / "run")
    return folder / "run"


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    runs.wait_until(lambda: any(done >= step for done in all_steps(run_dir / "checkpoints")), process)


@pytest.mark.slow
def test_killed_rank_then_resumed_gives_the_same_model(uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir, "--run.resume", "auto")
    process = runs.start(WORLD_SIZE, *options)
    wait_for_step(run_dir, 12, process)
    os.kill(runs.workers_of(process, run_dir)[-1], signal.SIGKILL)
    killed_at = time.monotonic()
    runs.finish(process, expected=1)
    assert time.monotonic() - killed_at < 40
    assert runs.children_with(str(run_dir)) == []
    steps = all_steps(run_dir / "checkpoints")
    assert 12 <= steps[-1] < 36

    output = runs.run(WORLD_SIZE, *options)
    assert f"resuming from {path_of(run_dir / 'checkpoints', steps[-1])}" in output
    expected, got = runs.summary(uninterrupted), runs.summary(run_dir)
    for key in ("model_sha256", "data_receipt", "test_confusion", "steps", "epochs"):
        assert got[key] == expected[key], key
    assert got["epochs"] == 3.6
    assert len(got["data_receipt"]) == 4
    train_steps = {name: runs.logged_steps(folder) for name, folder in (("whole", uninterrupted), ("resumed", run_dir))}
    assert train_steps["whole"] == train_steps["resumed"]

    again = runs.run(1, *options)
    assert "this run is complete" in again
    assert runs.summary(run_dir) == got


def test_resume_on_another_world_size_gives_the_same_model(uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    old = path_of(uninterrupted / "checkpoints", 32)
    runs.run(2, *OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path / "run", "--run.resume", old)
    expected, got = runs.summary(uninterrupted), runs.summary(tmp_path / "run")
    assert got["world_size"] == 2
    for key in ("model_sha256", "data_receipt", "test_confusion", "test_loss"):
        assert got[key] == expected[key], key


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_passed_over(uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for step in (28, 32):
        path = path_of(uninterrupted / "checkpoints", step)
        for source in (path, path.with_name(path.name + ".sha256")):
            (run_dir / "checkpoints" / source.name).write_bytes(source.read_bytes())
    newest = path_of(run_dir / "checkpoints", 32)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir, "--run.resume", "auto")
    output = runs.run(WORLD_SIZE, *options)
    assert f"skipped, and renamed to {newest.name}.skipped: {newest} is damaged" in output
    assert f"resuming from {path_of(run_dir / 'checkpoints', 28)}" in output
    assert runs.summary(run_dir)["model_sha256"] == runs.summary(uninterrupted)["model_sha256"]


def test_other_settings_cannot_resume(uninterrupted: Path, data_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", uninterrupted)
    output = runs.run(1, *options, "--run.resume", "auto", "--optim.lr", "0.123", expected=4)
    assert "optim.lr was" in output
    assert "Traceback" not in output
    refused = runs.run(1, *options, expected=2)
    assert "already holds a run" in refused
    after = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert changed <= {".lock"}
