"""The end of a process by `run_and_exit`: all that Python does for others, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs

PROGRAM = """
import atexit, ctypes, sys, threading, time
from cifar_dist.process import quick_imports, run_and_exit

def later():
    time.sleep(0.3)
    print("thread")

def main():
    threading.Thread(target=later).start()
    atexit.register(lambda: print("exit function"))
    ctypes.CDLL(None).printf(b"from C\\n")
    print("main")
    {end}

with quick_imports():
    import numpy
run_and_exit(main)
"""


def ended(end: str, expected: int, stdout: Any = subprocess.PIPE) -> tuple[str, str]:
    """What a program prints whose main ends with the statement `end`."""
    words = [sys.executable, "-c", PROGRAM.format(end=end)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        words, cwd=runs.REPOSITORY, env=buffered, text=True, check=False, stdout=stdout, stderr=subprocess.PIPE
    )  # fmt: skip
    assert result.returncode == expected, result.stderr
    return result.stdout, result.stderr


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(256 + 3)", 3, ""),
        ("sys.exit('a text')", 1, "a text\n"),
    ],
)
def test_nothing_is_lost_at_the_end(end: str, code: int, error: str) -> None:
    """As Python would: threads, then exit functions, and all output, though it goes to a pipe."""
    output, errors = ended(end, code)
    assert sorted(output.splitlines()) == ["exit function", "from C", "main", "thread"]
    assert [line for line in output.splitlines() if line != "from C"] == ["main", "thread", "exit function"]
    assert errors == error


def test_exception_is_reported() -> None:
    output, errors = ended("raise KeyError('planted')", 1)
    assert "exit function" in output
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.endswith("KeyError: 'planted'\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding: str) -> None:
    program = "from cifar_dist.process import run_and_exit; run_and_exit(lambda: print('\\u6f22 \\udcff \\xe4'))"
    output = subprocess.check_output(
        [sys.executable, "-c", program], cwd=runs.REPOSITORY, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert output.endswith(b"\n")
    assert rb"\udcff" in output


LONG = "from cifar_dist.process import run_and_exit; run_and_exit(lambda: print('x' * 200_000))"


def test_a_result_waits_for_a_slow_reader() -> None:
    """As `plan | less`: what is a command's result is not dropped, however long nobody reads it."""
    process = subprocess.Popen([sys.executable, "-c", LONG], cwd=runs.REPOSITORY, stdout=subprocess.PIPE)
    time.sleep(1)
    assert len(process.communicate(timeout=20)[0]) == 200_001
    assert process.returncode == 0


def test_a_closed_pipe_is_no_error() -> None:
    """As `plan | head -1`."""
    command = f'{sys.executable} -c "{LONG}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=runs.REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


def test_output_that_cannot_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        _, errors = ended("pass", 120, full)
    assert errors == "error: <stdout> cannot be written: No space left on device\n"
