"""The checks of `cifar_dist.doctor`. Each runs in a process of its own, within a time limit.

So a library that crashes, or a disk or a server that does not answer, costs one line of the result. Such a process is
`python -m cifar_dist.diagnosis.checks MODULE:FUNCTION DATA_DIR RUN_DIR`; it prints each finding as a line of JSON.
"""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cifar_dist.errors import UserError, one_line
from cifar_dist.process import kill_process_tree, run_and_exit

Status = Literal["ok", "warning", "problem"]
Name = Literal[
    "packages", "ffcv", "gpus", "processes", "data", "disk", "limits", "compiler", "wandb", "slurm", "variables"
]


class Finding(NamedTuple):
    status: Status
    found: str
    advice: str = ""
    """What to do, a command where there is one."""


class Folders(NamedTuple):
    data: Path
    runs: Path


@dataclass(frozen=True)
class Check:
    function: str
    """MODULE:NAME of a function from `Folders` to an iterator of findings."""
    limit_s: float
    advice: str
    """For a check that fails itself or gives no answer."""


_HERE = "cifar_dist.diagnosis"
# In the order of the output: what breaks most often first.
CHECKS: dict[Name, Check] = {
    "packages": Check(f"{_HERE}.software:packages", 30, "./launch/setup"),
    "ffcv": Check(f"{_HERE}.software:ffcv", 180, "Install FFCV again: rm -r .venv && ./launch/setup"),
    "gpus": Check(f"{_HERE}.devices:gpus", 180, "nvidia-smi shows what the driver knows; a hanging GPU needs a reset"),
    "processes": Check(
        f"{_HERE}.exchange:processes", 180,
        "Look for network interfaces that are down (ip address), and for a firewall (iptables -L)",
    ),
    "data": Check(f"{_HERE}.storage:data", 180, "Look for a slow or lost disk: dmesg, df"),
    "disk": Check(f"{_HERE}.storage:disk", 120, "Look for a slow or lost disk: dmesg, df"),
    "limits": Check(f"{_HERE}.limits:limits", 30, "ulimit -a shows the limits"),
    "compiler": Check(
        f"{_HERE}.software:compiler", 60,
        "Debian: apt-get install g++ python3-dev; conda: conda install -c conda-forge cxx-compiler",
    ),
    "wandb": Check(f"{_HERE}.services:wandb", 60, "WANDB_MODE=offline trains without W&B's server"),
    "slurm": Check(f"{_HERE}.services:slurm", 30, "Ask the administrators of the cluster: sinfo does not answer"),
    "variables": Check(f"{_HERE}.services:variables", 30, ""),
}  # fmt: skip


def run(check: Check, folders: Folders) -> list[Finding]:
    """The findings of `check`; the last one is a problem if the check failed or took too long."""
    words = [sys.executable, "-m", f"{_HERE}.checks", check.function, *map(str, folders)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=check.limit_s)
        failure = _failure(process.returncode, errors.decode(errors="replace"))
    except subprocess.TimeoutExpired as late:
        output, failure = late.output or b"", f"no answer within {check.limit_s:g} s"
        kill_process_tree(process.pid)
    findings = list(_findings(output.decode(errors="replace")))
    return [*findings, Finding("problem", failure, check.advice)] if failure else findings


def _failure(code: int, errors: str) -> str:
    """Why the process of a check did not end well; empty if it did."""
    if code < 0:
        return f"the check was killed by {signal.Signals(-code).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return f"the check failed: {one_line(lines[-1] if lines else f'exit code {code}')}" if code else ""


def _findings(output: str) -> Iterator[Finding]:
    for line in output.splitlines():  # libraries may print other lines
        with suppress(ValueError, TypeError):
            yield Finding(**json.loads(line))


def main() -> None:
    """Run the check that the command line names. Its errors are findings."""
    module, _, name = sys.argv[1].partition(":")
    try:
        check: Callable[[Folders], Iterator[Finding]] = getattr(importlib.import_module(module), name)
        for finding in check(Folders(*map(Path, sys.argv[2:]))):
            _print(finding)
    except UserError as error:
        found, _, advice = str(error).partition("\n")
        _print(Finding("problem", found, advice))
    except Exception as error:  # noqa: BLE001 - `run` adds what to do
        raise SystemExit(f"{type(error).__name__}: {one_line(error)}") from None


def _print(finding: Finding) -> None:
    print(json.dumps(finding._asdict()), flush=True)


if __name__ == "__main__":
    run_and_exit(main)
