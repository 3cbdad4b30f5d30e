"""Checks that go wrong, for tests of `cifar_dist.diagnosis.checks`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import NoReturn

from cifar_dist.diagnosis.checks import Finding, Folders
from cifar_dist.errors import UserError


def hang(folders: Folders) -> Iterator[Finding]:
    """Wait for a child that never ends, in a session of its own, whose command line has the name of the data folder."""
    yield Finding("ok", "before")
    subprocess.run(["sh", "-c", 'sleep 1000; : "$0"', str(folders.data)], start_new_session=True, check=False)


def crash(_: Folders) -> Iterator[Finding]:
    yield Finding("ok", "before")
    os.abort()


def fail(_: Folders) -> NoReturn:
    print("a library prints\n[1, 2]\n{}")
    raise RuntimeError("a driver\nis wrong")


def refuse(folders: Folders) -> NoReturn:
    raise UserError(f"{folders.runs} is wrong\nDo this")


def lose_a_disk(_: Folders) -> NoReturn:
    raise OSError(5, "Input/output error", "/disk")
