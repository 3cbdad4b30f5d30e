"""Where the training thread of this process is, for the thread that watches it (training.stall).

Going somewhere is two plain assignments, so a mark costs nothing. Until the first step is done the marks are kept,
which tells where start-up spends its time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

SLOW_S, VERY_SLOW_S = 540.0, 7200.0
"""What a process may take where work of unknown length is done: less than the 600 s after which the others' collectives
give up (`distributed.TIMEOUT_S`), or as long as one process may prepare the dataset."""


class Place(NamedTuple):
    """`waits`: for the other processes, so that it is not this one that holds them up. `limit_s`: it may stay so long
    although `run.stall_timeout_s` is less. `memory`: the setting to lower when there is not enough of it there."""

    what: str
    waits: bool = False
    limit_s: float = 0.0
    memory: str = "train.micro_batch_size"


@dataclass
class Here:
    """`step`: the optimizer step at hand, from 1; 0 before the first. `moves` grows with every mark."""

    place: Place
    step: int = 0
    moves: int = 0
    trail: list[tuple[str, float]] | None = field(default_factory=list)
    """What was begun when (monotonic clock), until the first step is done."""


here = Here(Place("starting"))


def go(place: Place) -> None:
    """Say that the training thread is now at `place`."""
    here.place = place
    here.moves += 1
    if here.trail is not None:
        here.trail.append((place.what, time.monotonic()))


def end_trail(age_s: float) -> dict[str, float]:
    """Seconds at each place so far, in the order of the first visits, by a process that is `age_s` old; once."""
    trail, here.trail = here.trail, None
    if not trail:
        return {}
    now = time.monotonic()
    spent = {"python and imports": age_s - (now - trail[0][1])}
    for (what, began), (_, ended) in zip(trail, [*trail[1:], ("", now)], strict=True):
        spent[what] = spent.get(what, 0.0) + ended - began
    return spent


@contextmanager
def at(place: Place) -> Iterator[None]:
    """Be at `place` inside, and then where it was before."""
    before = here.place
    go(place)
    try:
        yield
    finally:
        go(before)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, wait for the others, at what was being done."""
    with at(here.place._replace(waits=True, limit_s=0.0)):
        yield
