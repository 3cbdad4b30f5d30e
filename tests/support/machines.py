"""Launchers on this machine that stand for nodes of a run."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import psutil

from tests.scripts.test_launch import start
from tests.support import runs


def machine(cpu: int, port: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """One of several launchers that stand for nodes, with its own processor and one process."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1"} | environment
    return start("multinode", *arguments, cpu=runs.CPUS[cpu % len(runs.CPUS)], **common)


def listens(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


def lose(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and all its descendants at once, as when a node loses power."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in processes:
        one.suspend()
    for one in processes:
        one.kill()
    process.communicate()


def trainers(run_dir: Path) -> list[int]:
    """The processes that train, without launchers and what else runs around them."""
    found = []
    for pid in runs.children_with(str(run_dir)):
        try:
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found
