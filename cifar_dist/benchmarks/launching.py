"""Processes that a benchmark starts, and what they said."""

from __future__ import annotations

import os
import sys


def torchrun(num_processes: int, module: str) -> list[str]:
    """The beginning of a command line: `module` as so many processes on this machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m", module
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """This process's, for torchrun: each rank sets its own number of threads, without which torchrun would set one and
    say so."""
    return {"OMP_NUM_THREADS": "1"} | os.environ


def last_lines(text: str) -> str:
    """As much of what a process said as an error has room for."""
    return "\n".join(text.strip().splitlines()[-15:])
