"""Heartbeats and failure notices of all ranks, exchanged through the TCPStore of the process group.

A store call blocks while the process that hosts the store is suspended, whatever its timeout. So the exchange has its
own thread, nobody waits for that thread, and readers check how old a heartbeat is.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import psutil
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from cifar_dist.distributed import World
from cifar_dist.phase import Phase, started_ticks

INTERVAL_S = 1.0
_LOST_S = 3.0  # without a heartbeat, once a connection is lost: three intervals
_NOTICE = "notice"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes about itself. The default: nothing was received yet."""

    number: int = 0  # counts heartbeats, from 1
    step: int = 0  # optimizer step, from 1
    phase: Phase = Phase("starting")  # noqa: RUF009 - cannot be changed
    idle_s: float = 0.0  # since its phase last changed, counted by its own thread
    source: str = ""  # the module and line of this package that it executes, if it has been idle for long
    finished: bool = False  # it has left the run
    notified: bool = False  # it knows the failure notice
    host: str = "?"
    pid: int = 0
    namespace: str = ""  # of its process id
    started: int | None = None  # clock ticks after boot, as process ids are used again
    silent_s: float = 0.0  # since this heartbeat arrived, counted by the rank that received it

    def process_state(self) -> str:
        """running, suspended (by a signal or a debugger), ended; or elsewhere: on another node or in a container."""
        if self.host != socket.gethostname() or self.namespace != _namespace():
            return "elsewhere"
        with suppress(psutil.Error):
            status = psutil.Process(self.pid).status()
            if started_ticks(self.pid) == self.started and status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return "suspended" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "running"
        return "ended"

    def has_ended(self) -> bool:
        """Whether the process is known to have ended without leaving the run."""
        return self.number > 0 and not self.finished and self.process_state() == "ended"

    def kill(self) -> None:
        """Kill the process if it is on this node."""
        if self.process_state() in ("running", "suspended"):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class FailureNotice:
    """Why the run ends, published by the rank that knows."""

    kind: str  # class name of the error
    text: str  # its message
    abort: bool = False  # the run is stalled, so every rank exits at once, without waiting for its training thread
    reporter: int = 0  # the rank that prints the message if watchdogs end the run
    silent: list[int] = field(default_factory=list)  # with `abort`: the ranks without a heartbeat, which are killed


def identity() -> Heartbeat:
    """A heartbeat that only says which process this is."""
    pid = os.getpid()
    return Heartbeat(host=socket.gethostname(), pid=pid, namespace=_namespace(), started=started_ticks(pid))


@cache
def _namespace() -> str:
    """What tells process ids of different containers and machines apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "unknown"


class HeartbeatThread(threading.Thread):
    """Publishes this rank's heartbeat once a second and reads those of all ranks.

    Args:
        own: returns this rank's heartbeat; this thread sets `number`, `finished` and `notified`.

    `seen` has the newest heartbeat of every rank, `notice` the failure notice; `rounds` counts completed exchanges.
    """

    def __init__(self, world: World, own: Callable[[], Heartbeat]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank = world.rank
        self.seen = dict.fromkeys(range(world.size), Heartbeat())
        self.notice: FailureNotice | None = None
        self.rounds = 0
        self._own = own
        self._to_publish: FailureNotice | None = None
        self._closed, self._wake = threading.Event(), threading.Event()
        self._read_every = 1 + world.size // 16  # rounds; in large jobs the ranks are read less often
        self._store = PrefixStore("heartbeats", HashStore() if world.store is None else world.store.clone())

    def publish(self, notice: FailureNotice) -> None:
        """Tell all ranks, unless another notice was published before. Does not wait."""
        self._to_publish = notice
        self._wake.set()

    def find_lost_ranks(self) -> list[int] | None:
        """The ranks whose processes have ended; if those are not of this node, the ranks without a heartbeat for 3 s.

        Waits no longer than until there is a notice. None if the store is lost.
        """
        self._read_every, before = 1, dict[int, Heartbeat]()
        rounds, deadline = self.rounds, time.monotonic() + _LOST_S
        while self.notice is None and self.is_alive() and time.monotonic() < deadline:
            if not before and self.rounds < rounds + 2:
                self._wake.set()
            elif not before:
                before = dict(self.seen)  # with all heartbeats that were sent before the connection was lost
            elif ended := [rank for rank, heartbeat in self.seen.items() if heartbeat.has_ended()]:
                return ended
            time.sleep(0.1)
        if not self.is_alive() or not before:
            return None
        silent = [rank for rank, heartbeat in self.seen.items() if heartbeat.number == before[rank].number]
        # Ranks that left the run may have done so because of the lost one.
        return [rank for rank in silent if not self.seen[rank].finished] or silent  # unless all have left

    def is_first_to_report(self) -> bool:
        """Whether no other rank of this node has called this, so that the same error is printed once per node."""
        with suppress(RuntimeError):
            first = self._store.compare_set(f"reporter/{socket.gethostname()}", "", str(self.rank))
            return int(first) == self.rank
        return True

    def close(self) -> None:
        """Publish a last heartbeat and end, unless the store does not answer."""
        self._closed.set()
        self._wake.set()
        self.join(timeout=2 * INTERVAL_S)

    def run(self) -> None:
        # RuntimeError: the process that hosted the store has ended. `rounds` then stays as it is.
        with suppress(RuntimeError):
            while not self._closed.is_set():
                self._exchange()
                self._wake.wait(INTERVAL_S)
                self._wake.clear()
            self._send(finished=True)

    def _exchange(self) -> None:
        if self._to_publish is not None:
            self._store.compare_set(_NOTICE, "", json.dumps(asdict(self._to_publish)))  # the first one stays
        if self.notice is None and self._store.check([_NOTICE]):
            self.notice = FailureNotice(**json.loads(self._store.get(_NOTICE)))
        self._send(finished=False)
        if self.rounds % self._read_every == 0 or self.notice is not None:
            for rank, heartbeat in self.seen.items():
                # get() waits for a key that does not exist yet.
                if heartbeat.number or self._store.check([str(rank)]):
                    values = json.loads(self._store.get(str(rank)))
                    self.seen[rank] = Heartbeat(**values | {"phase": Phase(*values["phase"])})
        self.rounds += 1

    def _send(self, finished: bool) -> None:
        number, notified = self.rounds + 1, self.notice is not None
        heartbeat = replace(self._own(), number=number, finished=finished, notified=notified)
        self._store.set(str(self.rank), json.dumps(asdict(heartbeat)))
