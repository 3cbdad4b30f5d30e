"""Who owns a run directory: processes that hold one, die, stand still and come back, on this machine and another.

Another machine is a process with another host name, whose lock on .lock is out of the way, as where a network file
system keeps locks to one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar_dist import processes
from cifar_dist.errors import RunInUseError
from cifar_dist.training import takeover
from cifar_dist.training.owner import Owner
from cifar_dist.training.takeover import LOCK, acquire
from tests import runs

pytestmark = pytest.mark.xdist_group("clock")
OPTIONS = (*runs.SHORT, "--run.resume", "auto")
# Directory, seconds until an owner that is asked to go is ended, seconds to hold the directory.
HOLD = """
import sys, time
from pathlib import Path
from cifar_dist.errors import reported
from cifar_dist.training import claim, takeover

claim.LEAVE_S = float(sys.argv[2])
with reported():
    held = takeover.acquire(Path(sys.argv[1]), True, print)
    print("owner", flush=True)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        time.sleep(0.1)
        held.check()
    held.release()
"""


def holder(directory: Path, hold_s: float, *, leave_s: float = 60, host: str = "", **env: str) -> subprocess.Popen[str]:
    """A process that does nothing but own `directory`, under another host name if one is given."""
    words = [sys.executable, "-c", HOLD, str(directory), str(leave_s), str(hold_s)]
    return subprocess.Popen(
        elsewhere(words, host) if host else words,
        env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def elsewhere(words: list[str], host: str) -> list[str]:
    """The command, under another host name."""
    enter = ["unshare", "--uts"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: another machine, as this user may not change the host name (unshare --uts)")
    return [*enter, "sh", "-c", 'hostname "$0"; exec "$@"', host, *words]


def owner(directory: Path) -> dict[str, Any]:
    """What .owner says; empty without one."""
    path = directory / ".owner"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return values


def wait_for_owner(directory: Path, process: subprocess.Popen[str]) -> None:
    runs.wait_until(lambda: owner(directory).get("pid") == process.pid, process)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes put in here are killed at the end."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen(["sleep", "100"])
    ticks = processes.started_ticks(child.pid)
    assert ticks is not None
    assert not processes.is_gone(child.pid, ticks)
    assert processes.is_gone(child.pid, ticks - 1)  # an earlier one with that number
    assert processes.parent_of(child.pid) == os.getpid()
    child.kill()
    deadline = time.monotonic() + 10
    while not processes.is_gone(child.pid, ticks):  # though not waited for yet
        assert time.monotonic() < deadline
    child.wait()
    assert processes.is_gone(child.pid, ticks)
    assert not processes.is_gone(1, None)
    assert 0 < processes.age_s() < 24 * 3600


def test_its_number_counts_on_this_machine_and_boot_and_container_only() -> None:
    me = Owner.me()
    assert me.is_here()
    assert Owner.read(me.text(7)) == me
    assert len(me.text(1)) == len(me.text(999_999))
    for other in (
        replace(me, host="clone"),
        replace(me, boot="before"),
        replace(me, namespace="1"),
        replace(me, boot=""),
    ):
        assert not other.is_here()
        assert not replace(other, pid=2**22 + 1).has_ended()
    assert replace(me, pid=2**22 + 1).has_ended()
    for text in (b"", b"{}", b"[]", me.text(1)[:40], b'{"host": "a", "pid": 3, "job": null}'):
        assert Owner.read(text) is None


def test_a_later_start_of_the_same_job_comes_after() -> None:
    first = replace(Owner.me(), job="42", restarts=0)
    assert first.is_predecessor_of(replace(first, restarts=1))
    assert not first.is_predecessor_of(replace(first, job="43", restarts=1))
    assert not first.is_predecessor_of(first)
    assert not replace(first, job=None).is_predecessor_of(replace(first, job=None, restarts=1))


def test_a_living_owner_stays(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    first = holder(tmp_path, 600)
    started.append(first)
    wait_for_owner(tmp_path, first)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(RunInUseError, match=f"in use by process {first.pid} on "):
            acquire(tmp_path, True, print)
        (tmp_path / LOCK).unlink(missing_ok=True)  # then its lock does not count, and .owner alone tells
    assert time.monotonic() - began < 1.5
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RunInUseError):
        acquire(tmp_path, True, print)
    first.kill()
    first.wait()
    said: list[str] = []
    began = time.monotonic()
    claim = acquire(tmp_path, False, said.append)
    assert time.monotonic() - began < 1.5
    assert "left" in said[0]
    claim.check()
    claim.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]


def test_an_owner_elsewhere_is_watched(
    tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its heart beats it stays; dead, it is seen to be so after a while; and one that comes back must go."""
    monkeypatch.setattr(takeover, "WATCH_S", 6.0)  # three beats
    first = holder(tmp_path, 600, host="elsewhere")
    started.append(first)
    wait_for_owner(tmp_path, first)
    assert owner(tmp_path)["host"] == "elsewhere"
    (tmp_path / LOCK).unlink()
    began = time.monotonic()
    with pytest.raises(RunInUseError, match=f"in use by process {first.pid} on elsewhere"):
        acquire(tmp_path, True, print)
    assert time.monotonic() - began < 8
    first.send_signal(signal.SIGSTOP)
    said: list[str] = []
    began = time.monotonic()
    claim = acquire(tmp_path, True, said.append)
    assert 6 < time.monotonic() - began < 20
    assert "whether its heart beats" in said[0]
    first.send_signal(signal.SIGCONT)
    output = runs.finish(first, expected=7, timeout_s=10)
    assert f"is no longer this run's: process {os.getpid()} on " in output
    time.sleep(2.5)  # longer than a beat
    claim.check()
    assert owner(tmp_path)["pid"] == os.getpid()
    claim.release()


def test_a_removed_claim_is_lost(tmp_path: Path) -> None:
    claim = acquire(tmp_path, True, print)
    claim.check()
    (tmp_path / ".owner").unlink()
    with pytest.raises(RunInUseError, match=r"its \.owner is gone"):
        claim.check()
    claim.release()


def test_an_owner_that_hangs_is_ended_for_its_successor(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    first = holder(tmp_path, 600, leave_s=3, SLURM_JOB_ID="42")
    started.append(first)
    wait_for_owner(tmp_path, first)
    second = holder(tmp_path, 0, SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1")
    started.append(second)
    output = runs.finish(second, timeout_s=20)
    assert f"waiting for process {first.pid}" in output
    assert "asked to stop and save" in output
    output = runs.finish(first, expected=7, timeout_s=5)
    assert f"asked by process {second.pid} on " in output
    assert "(job 42, restart 1) to leave" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]


def finished(run_dir: Path, whole: Path, *keys: str) -> None:
    """Nothing is missing, nothing there twice, and nothing left over."""
    runs.assert_same(run_dir, whole, *keys)
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".") and path.name != LOCK]


@pytest.mark.run
@pytest.mark.data
def test_killed_and_resumed_at_once(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path)
    first = runs.start(1, *options)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), first)
    first.kill()
    output = runs.run(1, *options)
    assert f"process {first.pid} on " in output
    assert "without a word and is gone; taken over" in output
    assert "waiting" not in output
    first.communicate()
    finished(tmp_path, short_run)


@pytest.mark.run
@pytest.mark.data
def test_resumed_while_orphans_save(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """The launcher is killed; its workers stand still for a moment, and save while the next start waits for them."""
    launch = [sys.executable, "-m", "cifar_dist.launch", "--standalone", "--nproc-per-node", "2", "-m"]
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
    assert "its launcher was killed, so it is about to save and end" in line
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert "going on from" in runs.finish(second)
    finished(tmp_path, short_run, "data_receipt")
    first.communicate()


@pytest.mark.run
@pytest.mark.data
def test_a_requeued_job_takes_over_from_its_earlier_start(
    short_run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start stands still, so that the others meet it in the middle of its steps."""
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    first = runs.start(1, *options)
    runs.wait_until(lambda: runs.logged_steps(tmp_path), first)
    first.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = runs.start(1, *options)
    runs.wait_until((tmp_path / ".takeover").exists, second)
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    refused = runs.run(1, *options, expected=7)
    assert f"in use by process {first.pid} on " in refused
    assert "Traceback" not in refused
    first.send_signal(signal.SIGCONT)
    output = runs.finish(first, expected=75)
    assert f"asked by process {second.pid} on " in output
    assert "stopped by SIGUSR1 after step " in output
    output = runs.finish(second)
    assert f"waiting for process {first.pid} on " in output
    assert "going on from" in output
    finished(tmp_path, short_run)


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.data
def test_a_run_that_stood_still_and_lost_its_directory_writes_no_more(
    short_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Two ranks stand still, as with their machine; the run goes on elsewhere, and then they come back."""
    options = [*OPTIONS, "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "cifar_dist.launch", "--standalone", "--nproc-per-node", "2", "-m"]
    first = runs.start_command([*launch, "cifar_dist.train", *options])
    runs.wait_until(lambda: runs.logged_steps(tmp_path / "run"), first)
    frozen = [first.pid, *runs.workers_of(first, tmp_path)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    (tmp_path / "run" / LOCK).unlink()
    words = [*runs.command(1), *options]
    second = runs.start_command(elsewhere(words, "elsewhere"))
    runs.wait_until(lambda: owner(tmp_path / "run").get("host") == "elsewhere", second)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    output = runs.finish(first, expected=7)
    assert output.count("error: ") == 1
    assert f"is no longer this run's: process {second.pid} on elsewhere has it now" in output
    assert "Traceback" not in output
    output = runs.finish(second)
    assert "without a word and is gone; taken over" in output
    finished(tmp_path / "run", short_run, "data_receipt")
    shutil.rmtree(tmp_path / "run")
