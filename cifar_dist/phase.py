"""The phase of work that the training thread of this process is in.

The watchdog thread (fault_tolerance.watchdog) reads it to tell which rank holds a run up. Setting a phase takes two
assignments. Until the end of the first step every change is recorded, which gives the seconds of each part of start-up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SLOW_S = 540.0
"""Limit for work of unknown length. Collectives of the other ranks time out after 600 s (`distributed.TIMEOUT_S`)."""
VERY_SLOW_S = 7200.0
"""Limit for preparing the dataset."""


class Phase(NamedTuple):
    """A kind of work.

    Args:
        name: for messages.
        waits: this rank waits for other ranks, so it is not the one that holds the run up.
        limit_s: seconds allowed in this phase, if longer than `run.stall_timeout_s`.
        memory: the setting to lower when this phase runs out of memory.
    """

    name: str
    waits: bool = False
    limit_s: float = 0.0
    memory: str = "train.micro_batch_size"


@dataclass
class Current:
    """What the training thread does now. `step`: the optimizer step, from 1; 0 before the first."""

    phase: Phase
    step: int = 0
    changes: int = 0  # how often a phase was set
    startup: list[tuple[str, float]] | None = field(default_factory=list)
    """(phase, monotonic time of its start) until the first step is done."""


current = Current(Phase("starting"))


def set_phase(phase: Phase) -> None:
    current.phase = phase
    current.changes += 1
    if current.startup is not None:
        current.startup.append((phase.name, time.monotonic()))


def end_startup(age_s: float) -> dict[str, float]:
    """Stop recording; return the seconds in each phase so far, for a process that is `age_s` old.

    Phases stand in the order in which they were first set. A second call returns nothing.
    """
    startup, current.startup = current.startup, None
    if not startup:
        return {}
    now = time.monotonic()
    seconds = {"python and imports": age_s - (now - startup[0][1])}
    for (name, began), (_, ended) in zip(startup, [*startup[1:], ("", now)], strict=True):
        seconds[name] = seconds.get(name, 0.0) + ended - began
    return seconds


def process_age_s() -> float:
    """Seconds since this process started. Setting the system clock does not change it."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def in_phase(phase: Phase) -> Iterator[None]:
    """Set `phase` inside, and the previous phase again afterwards."""
    before = current.phase
    set_phase(phase)
    try:
        yield
    finally:
        set_phase(before)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, the current phase counts as waiting for other ranks."""
    with in_phase(current.phase._replace(waits=True, limit_s=0.0)):
        yield
