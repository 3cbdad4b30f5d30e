"""The phase of work that the training thread is in, and the seconds spent in each phase so far.

The watchdog thread (fault_tolerance.watchdog) reads the phase.
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SLOW_S = 540.0  # for work of unknown length; shorter than the other ranks wait in a collective (distributed.TIMEOUT_S)
VERY_SLOW_S = 7200.0  # for work during which no rank waits in such a collective


class Phase(NamedTuple):
    """A kind of work."""

    name: str  # for messages
    waits: bool = False  # this rank only waits for others, so it does not stall the run
    limit_s: float = 0.0  # seconds allowed in this phase, if longer than `run.stall_timeout_s`
    memory_setting: str = "train.micro_batch_size"  # to lower when this phase runs out of memory


@dataclass
class Current:
    """What the training thread does now."""

    phase: Phase
    step: int = 0  # the optimizer step, from 1; 0 before the first
    began: float = field(default_factory=time.monotonic)  # when `phase` was set, also again
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, in order of their first end


current = Current(Phase("starting"))


def set_phase(phase: Phase) -> None:
    name, now = current.phase.name, time.monotonic()
    current.seconds[name] = current.seconds.get(name, 0.0) + now - current.began
    current.phase, current.began = phase, now


def seconds_by_phase(age_s: float) -> dict[str, float]:
    """Seconds spent in each phase so far, in order, by a process that is `age_s` old."""
    set_phase(current.phase)  # counts the seconds in it
    _, *phases = current.seconds.items()  # the first one began when this module was imported
    return {"python and imports": age_s - sum(seconds for _, seconds in phases), **dict(phases)}


@contextmanager
def in_phase(phase: Phase) -> Iterator[None]:
    """Set `phase` inside, and the previous phase again afterwards."""
    before = current.phase
    set_phase(phase)
    try:
        yield
    finally:
        set_phase(before)


def waiting() -> AbstractContextManager[None]:
    """Inside, the current phase counts as waiting for other ranks."""
    return in_phase(current.phase._replace(waits=True, limit_s=0.0))


def started_ticks(pid: int) -> int | None:
    """Start time in clock ticks since boot, None if unknown. psutil's create_time moves with the system clock."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def process_age_s() -> float:
    """Seconds since this process started. Setting the system clock does not change it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (started_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
