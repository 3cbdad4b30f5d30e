"""The run lock: its owner dies, is suspended, resumes or is asked to exit, on this node and on another.

Another node is a process with another host name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.errors import RunInUseError
from cifar_dist.fault_tolerance import run_lock
from cifar_dist.fault_tolerance.run_lock import JOB, LOCK, REQUEST, acquire
from tests.support import runs
from tests.support.lock_holders import LEASE_S, elsewhere, holder, owner, wait_for_owner

pytestmark = pytest.mark.xdist_group("clock")
OPTIONS = (*runs.SHORT, "--run.resume", "auto")


@pytest.fixture
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LEASE_S", LEASE_S)
    monkeypatch.setattr(run_lock, "WAIT_S", 4.0)


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(".lock"))


@pytest.mark.usefixtures("_short_lease")
def test_a_living_owner_keeps_the_lock(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    first = holder(tmp_path, 600)
    started.append(first)
    wait_for_owner(tmp_path, first)
    began = time.monotonic()
    with pytest.raises(RunInUseError, match=f"in use by process {first.pid} on "):
        acquire(tmp_path, False, print)
    assert time.monotonic() - began < 4  # two heartbeats
    with pytest.raises(RunInUseError, match=f"in use by process {first.pid} on "):
        acquire(tmp_path, True, print)
    assert owner(tmp_path)[0] == first.pid
    first.kill()
    first.wait()
    said: list[str] = []
    began = time.monotonic()
    lock = acquire(tmp_path, False, said.append)
    assert time.monotonic() - began < 1.5  # a dead owner on this node is known at once
    assert said == [f"process {first.pid} on {os.uname().nodename} no longer holds {tmp_path}; taken over"]
    lock.check()
    lock.release()
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "host", [pytest.param("", id="this node", marks=pytest.mark.slow), pytest.param("elsewhere", id="another node")]
)
@pytest.mark.usefixtures("_short_lease")
def test_a_suspended_owner_loses_the_lock(host: str, tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """After LEASE_S without a heartbeat; when it resumes it must not write."""
    first = holder(tmp_path, 600, host=host)
    started.append(first)
    wait_for_owner(tmp_path, first)
    first.send_signal(signal.SIGSTOP)
    said: list[str] = []
    began = time.monotonic()
    lock = acquire(tmp_path, True, said.append)
    assert LEASE_S - 1 < time.monotonic() - began < LEASE_S + 10
    assert "not refreshed yet" in said[0]
    first.send_signal(signal.SIGCONT)
    output = runs.finish(first, expected=7, timeout_s=15)
    assert f"no longer owns its directory {tmp_path}: process {os.getpid()} on " in output
    time.sleep(2.5)  # longer than a heartbeat
    lock.check()
    assert owner(tmp_path)[0] == os.getpid()
    lock.release()


@pytest.mark.usefixtures("_short_lease")
def test_a_living_owner_elsewhere_keeps_the_lock(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    first = holder(tmp_path, 600, host="elsewhere")
    started.append(first)
    wait_for_owner(tmp_path, first)
    assert owner(tmp_path) == (first.pid, "elsewhere")
    began = time.monotonic()
    with pytest.raises(RunInUseError, match=f"in use by process {first.pid} on elsewhere"):
        acquire(tmp_path, False, print)
    assert time.monotonic() - began < 4


def test_a_removed_lock_is_lost(tmp_path: Path) -> None:
    lock = acquire(tmp_path, True, print)
    lock.check()
    (tmp_path / LOCK).unlink()
    with pytest.raises(RunInUseError, match=r"its \.lock is gone"):
        lock.check()
    lock.release()


@pytest.mark.slow
def test_an_earlier_start_that_hangs_is_killed(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    first = holder(tmp_path, 600, exit_s=3, SLURM_JOB_ID="42")
    started.append(first)
    wait_for_owner(tmp_path, first)
    runs.wait_until((tmp_path / JOB).exists, first)
    second = holder(tmp_path, 0, SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1")
    started.append(second)
    output = runs.finish(second, timeout_s=30)
    assert f"waiting for process {first.pid}" in output
    assert "asked to save and exit" in output
    output = runs.finish(first, expected=7, timeout_s=5)
    assert f"asked by process {second.pid} on " in output
    assert "(job 42, restart 1) to release" in output
    assert left(tmp_path) == []


@pytest.mark.parametrize(("job", "restarts"), [("43", "1"), ("42", "0")], ids=["another job", "the same start"])
@pytest.mark.usefixtures("_short_lease")
def test_only_an_earlier_start_of_the_job_is_asked_to_exit(
    job: str, restarts: str, tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = holder(tmp_path, 600, SLURM_JOB_ID="42")
    started.append(first)
    runs.wait_until((tmp_path / JOB).exists, first)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with pytest.raises(RunInUseError, match=r"\(job 42\)\. Wait for that job"):
        acquire(tmp_path, True, print)
    assert not (tmp_path / REQUEST).exists()


def finished(run_dir: Path, whole: Path, *keys: str) -> None:
    """Nothing is missing, nothing there twice, and nothing left over."""
    runs.assert_same(run_dir, whole, *keys)
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]


@pytest.mark.run
@pytest.mark.data
def test_killed_and_resumed_at_once(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path)
    first = runs.start(1, *options)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), first)
    first.kill()
    first.communicate()
    output = runs.run(1, *options)
    assert f"process {first.pid} on " in output
    assert "; taken over" in output
    assert "waiting" not in output
    finished(tmp_path, short_run)


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.data
def test_resumed_while_orphans_save(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """The launcher is killed; its workers stand still for a moment, and save while the next start waits for them."""
    launch = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2", "-m"]
    options = [*OPTIONS, "--data.dir", str(data_dir), "--run.dir", str(tmp_path)]
    first = runs.start_command([*launch, "cifar_dist.train", *options])
    runs.wait_until(lambda: runs.logged_steps(tmp_path), first)
    workers = runs.workers_of(first, tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    first.kill()
    first.wait()
    second = runs.start(1, *options)
    assert second.stdout is not None
    line = ""
    while "waiting for process" not in line:
        line = second.stdout.readline()
        assert line
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert "resuming from" in runs.finish(second)
    finished(tmp_path, short_run, "data_receipt")
    first.communicate()


@pytest.mark.run
@pytest.mark.data
def test_a_requeued_job_takes_over_from_its_earlier_start(
    short_run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start is suspended, so that the others find it between two steps."""
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    first = runs.start(1, *options)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), first)
    first.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = runs.start(1, *options)
    runs.wait_until((tmp_path / REQUEST).exists, second)
    first.send_signal(signal.SIGCONT)
    output = runs.finish(first, expected=75)
    assert f"asked by process {second.pid} on " in output
    assert "stopped by SIGUSR1 after step " in output
    output = runs.finish(second)
    assert f"waiting for process {first.pid} on " in output
    assert "resuming from" in output
    finished(tmp_path, short_run)


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.data
def test_suspended_run_that_lost_its_lease_writes_nothing(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """Two ranks are suspended, as with their node; another process resumes the run; then the two continue."""
    options = [*OPTIONS, "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2", "-m"]
    first = runs.start_command([*launch, "cifar_dist.train", *options])
    runs.wait_until(lambda: runs.logged_steps(tmp_path / "run"), first)
    frozen = [first.pid, *runs.workers_of(first, tmp_path)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    words = [*runs.command(1), *options]
    second = runs.start_command(elsewhere(words, "elsewhere"))
    runs.wait_until(lambda: owner(tmp_path / "run")[1] == "elsewhere", second)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    output = runs.finish(first, expected=7)
    assert output.count("error: ") == 1
    assert f"process {second.pid} on elsewhere owns it now" in output
    assert "Traceback" not in output
    output = runs.finish(second)
    assert "; taken over" in output
    finished(tmp_path / "run", short_run, "data_receipt")
    shutil.rmtree(tmp_path / "run")
