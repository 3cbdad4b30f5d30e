"""Whether the owner of a run directory lives, on this machine and on another."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cifar_dist.fault_tolerance.liveness import WATCH_S, living_owners
from tests.support.lock_holders import holder, wait_for_owner

pytestmark = pytest.mark.xdist_group("clock")


def hold(directory: Path, started: list[subprocess.Popen[str]], host: str = "") -> subprocess.Popen[str]:
    started.append(holder(directory, 600, host=host))
    wait_for_owner(directory, started[-1])
    return started[-1]


def test_on_this_machine(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    process = hold(tmp_path, started)
    assert living_owners([tmp_path, tmp_path / "none"])[tmp_path].pid == process.pid
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists()
    began = time.monotonic()
    assert living_owners([tmp_path]) == {}
    assert time.monotonic() - began < 1


def test_an_owner_that_has_exited_but_was_not_waited_for(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """A zombie."""
    process = hold(tmp_path, started)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert living_owners([tmp_path]) == {}


@pytest.mark.parametrize("clock", ["right", "half an hour slow", "half an hour fast"])
def test_on_another_machine(
    clock: str, tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, skew = time.time, {"right": 0, "half an hour slow": -1800, "half an hour fast": 1800}[clock]
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    process = hold(tmp_path, started, "elsewhere")
    assert living_owners([tmp_path])[tmp_path][:2] == (process.pid, "elsewhere")
    process.kill()
    process.wait()
    began = time.monotonic()
    # By the clock its lease has not expired yet; or nothing was refreshed while it was watched.
    assert (living_owners([tmp_path]) == {}) == bool(skew)
    assert time.monotonic() - began < WATCH_S + 2


def test_a_marker_of_yesterday_is_not_watched(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    process = hold(tmp_path, started, "elsewhere")
    process.kill()
    process.wait()
    os.utime(tmp_path / ".lock", (time.time() - 86_400,) * 2)
    began = time.monotonic()
    assert living_owners([tmp_path]) == {}
    assert time.monotonic() - began < 1


def test_a_process_with_the_number_of_a_dead_owner(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """It started at another time. A suspended owner is one."""
    process = hold(tmp_path, started)
    process.send_signal(signal.SIGSTOP)  # it refreshes nothing
    marker = tmp_path / ".lock"
    text = marker.read_text()
    assert tmp_path in living_owners([tmp_path])
    start = next(line for line in text.splitlines() if line.startswith("start="))
    marker.write_text(text.replace(start, f"start={int(start[6:]) - 1}"))
    assert living_owners([tmp_path]) == {}


def test_another_container(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """A process of another namespace is told by its marker only, whatever has its number here."""
    process = hold(tmp_path, started)
    process.send_signal(signal.SIGSTOP)
    marker = tmp_path / ".lock"
    host = next(line for line in marker.read_text().splitlines() if line.startswith("host="))
    marker.write_text(marker.read_text().replace(host, f"{host.partition('?')[0]}?pidns-f0000001"))
    assert tmp_path in living_owners([tmp_path])
    os.utime(marker, (time.time() - 86_400,) * 2)
    assert living_owners([tmp_path]) == {}
