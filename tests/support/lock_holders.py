"""Processes that only hold the lock of a run directory, on this node and, under another host name, on another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.fault_tolerance import run_lock
from tests.support import runs

LEASE_S = 6.0  # three heartbeats; whole runs here use the real lease
# Arguments: directory, EXIT_S, seconds to hold the lock, LEASE_S.
HOLD = """
import sys, time
from pathlib import Path
from cifar_dist.errors import exit_on_error
from cifar_dist.fault_tolerance import run_lock

run_lock.EXIT_S, run_lock.LEASE_S = float(sys.argv[2]), float(sys.argv[4])
with exit_on_error():
    lock = run_lock.acquire(Path(sys.argv[1]), True, print)
    print("acquired", flush=True)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        time.sleep(0.1)
        lock.check()
    lock.release()
"""


def holder(directory: Path, hold_s: float, *, exit_s: float = 60, host: str = "", **env: str) -> subprocess.Popen[str]:
    """A process that only holds the lock of `directory`, under another host name if `host` is given."""
    words = [sys.executable, "-c", HOLD, str(directory), str(exit_s), str(hold_s), str(LEASE_S)]
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


def owner(directory: Path) -> tuple[int, str]:
    """Process id and host of the owner; (0, "") without one."""
    found = run_lock.owner(directory)
    return (0, "") if found is None else (found.pid, found.host)


def wait_for_owner(directory: Path, process: subprocess.Popen[str]) -> None:
    runs.wait_until(lambda: owner(directory)[0] == process.pid, process)
