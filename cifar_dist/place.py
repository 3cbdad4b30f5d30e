"""Where the training thread of this process is, for the thread that watches it (training.stall).

Going somewhere is two plain assignments, so a mark costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


here = Here(Place("starting"))


def go(place: Place) -> None:
    """Say that the training thread is now at `place`."""
    here.place = place
    here.moves += 1


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
