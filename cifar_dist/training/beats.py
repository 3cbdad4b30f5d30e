"""Signs of life that the ranks send each other once a second, and the last words of one that fails.

They go through the store by which the ranks met, on a connection of their own. That may block for as long as the
process that holds the store is stopped, whatever timeout one asks for: so nobody waits for this thread, and who reads
`seen` looks at how long ago it was.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from torch.distributed import distributed_c10d

from cifar_dist import processes

TICK_S = 1.0
_WORDS = "cifar_dist/words"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `idle_s`: since it last moved, by its own count of seconds at work. `machine` tells
    whether a process id means the same to two processes, and `born` whether it is still the same process."""

    number: int = 0  # 0: nothing was heard of it yet
    step: int = 0
    what: str = "starting"
    waits: bool = False
    limit_s: float = 0.0
    idle_s: float = 0.0
    source: str = ""  # of a rank that has not moved for long: the line of this package that it is at
    left: bool = False  # it has done its part
    heard: bool = False  # it knows the last words
    host: str = "?"
    pid: int = 0
    born: int | None = None
    machine: str = ""

    def process_state(self) -> str:
        """R, S, D, T (stopped), Z ... as in /proc; empty if it is on another machine or no more."""
        if not self.machine or self.machine != machine():
            return ""
        return processes.state(self.pid) if processes.started_ticks(self.pid) == self.born else ""

    def kill(self) -> None:
        """Kill that process if it is on this machine."""
        if self.process_state():
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Words:
    """Why the run ends, from the rank that knows: the name of the error's class and its message. `abort`: it stands
    still, so that all leave at once, `speaker` says why, and the ranks in `silent` are killed."""

    kind: str
    text: str
    abort: bool = False
    speaker: int = 0
    silent: tuple[int, ...] = ()


@cache
def machine() -> str:
    """The same for two processes if they see the same process ids; empty where that is hidden."""
    _, *where = processes.place()
    return " ".join(where) if all(where) else ""


def identity() -> dict[str, Any]:
    """Which process this is, as fields of its beats."""
    pid = os.getpid()
    born = processes.started_ticks(pid)
    return {"host": socket.gethostname(), "pid": pid, "born": born, "machine": machine()}


class Exchange(threading.Thread):
    """Sends what `own` returns and keeps the newest beat of every rank in `seen`, and the last words in `words`.

    `rounds` counts what went through. In a large job the others are read less often.
    """

    def __init__(self, rank: int, size: int, own: Callable[[int, bool], Beat]) -> None:
        super().__init__(name="beats", daemon=True)
        self.rank, self.size, self._own = rank, size, own
        self.seen = {other: Beat() for other in range(size)}
        self.words: Words | None = None
        self.rounds = 0
        self._to_say: Words | None = None
        self._closed, self._wake = threading.Event(), threading.Event()
        self._store = distributed_c10d._get_default_store().clone()

    def say(self, words: Words) -> None:
        """Let all ranks know, unless another has said why before. Does not wait."""
        self._to_say = words
        self._wake.set()

    def close(self) -> None:
        """Send a last beat and end, unless the store does not answer."""
        self._closed.set()
        self._wake.set()
        self.join(timeout=2 * TICK_S)

    def run(self) -> None:
        # A RuntimeError: the store went with the process that held it, and `rounds` stands still.
        with suppress(RuntimeError):
            while not self._closed.is_set():
                self._round()
                self._wake.wait(TICK_S)
                self._wake.clear()
            self._store.set(_key(self.rank), json.dumps(asdict(self._own(self.rounds + 1, True))))

    def _round(self) -> None:
        if self._to_say is not None and self.words is None:
            said = self._store.compare_set(_WORDS, "", json.dumps(asdict(self._to_say)))
            self.words = _words(said)
        elif self.words is None and self._store.check([_WORDS]):
            self.words = _words(self._store.get(_WORDS))
        beat = self._own(self.rounds + 1, False)
        self._store.set(_key(self.rank), json.dumps(asdict(beat)))
        if self.rounds % (1 + self.size // 16) == 0 or self.words is not None:
            for other in range(self.size):
                key = _key(other)
                # Asking for what is not there yet would wait.
                if self.seen[other].number or self._store.check([key]):
                    self.seen[other] = Beat(**json.loads(self._store.get(key)))
        self.rounds += 1


def _key(rank: int) -> str:
    return f"cifar_dist/beat/{rank}"


def _words(text: bytes) -> Words:
    values = json.loads(text)
    return Words(**values | {"silent": tuple(values["silent"])})
