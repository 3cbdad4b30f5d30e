"""A check that hangs, crashes or fails costs a line; what it found before stays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import pytest

from cifar_dist.diagnosis.checks import CHECKS, Check, Finding, Folders, Name, run
from tests.support import runs

BEFORE = Finding("ok", "before")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("crash", [BEFORE, Finding("problem", "the check was killed by SIGABRT", "advice")]),
        ("fail", [Finding("problem", "the check failed: RuntimeError: a driver is wrong", "advice")]),
        ("refuse", [Finding("problem", "/r is wrong", "Do this")]),
        ("lose_a_disk", [Finding("problem", "the check failed: OSError: [Errno 5] Input/output error: '/disk'",
                                 "advice")]),
        ("absent", [Finding("problem", "the check failed: AttributeError: module 'tests.support.checks' has no "
                                       "attribute 'absent'", "advice")]),
    ],
)  # fmt: skip
def test_errors_are_findings(name: str, expected: list[Finding]) -> None:
    check = Check(f"tests.support.checks:{name}", 60, "advice")
    assert run(check, Folders(Path("/d"), Path("/r"))) == expected


def test_a_check_that_hangs(tmp_path: Path) -> None:
    """It and the processes that it started are killed."""
    started = time.monotonic()
    found = run(Check("tests.support.checks:hang", 6, "advice"), Folders(tmp_path, Path("r")))
    assert found == [BEFORE, Finding("problem", "no answer within 6 s", "advice")]
    assert time.monotonic() - started < 20
    assert runs.children_with(str(tmp_path)) == []


def test_every_check_has_a_name_for_the_command_line() -> None:
    assert tuple(CHECKS) == get_args(Name)
