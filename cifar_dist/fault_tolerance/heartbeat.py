"""Heartbeats and failure notices of all ranks, exchanged through the TCPStore of the process group.

A store call blocks while the process that hosts the store is suspended, whatever its timeout. So the exchange has its
own thread, nobody waits for that thread, and readers check how old a heartbeat is.
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
from typing import Any

import psutil
from torch.distributed import distributed_c10d

from cifar_dist.fault_tolerance import processes

INTERVAL_S = 1.0
_NOTICE = "cifar_dist/notice"
_ENDED = ("", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_SUSPENDED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes about itself.

    Args:
        number: counts heartbeats; 0: none was received yet.
        step: optimizer step, from 1.
        phase, waits, limit_s: its phase, see phase.Phase.
        idle_s: seconds since its phase last changed, counted by its own thread.
        source: the line of this package that it executes, if it has been idle for long.
        finished: it has left the run.
        notified: it knows the failure notice.
        host, pid, started, namespace: which process it is; see fault_tolerance.processes.
    """

    number: int = 0
    step: int = 0
    phase: str = "starting"
    waits: bool = False
    limit_s: float = 0.0
    idle_s: float = 0.0
    source: str = ""
    finished: bool = False
    notified: bool = False
    host: str = "?"
    pid: int = 0
    started: int | None = None
    namespace: str = ""

    def is_local(self) -> bool:
        """Whether its process id can be used here."""
        return bool(self.namespace) and self.namespace == processes.namespace()

    def has_ended(self) -> bool:
        """Whether the process is known to have ended; False on another node."""
        return self.is_local() and processes.status(self.pid, self.started) in _ENDED

    def is_suspended(self) -> bool:
        """Whether the process is known to be stopped by a signal or debugger."""
        return self.is_local() and processes.status(self.pid, self.started) in _SUSPENDED

    def is_running(self) -> bool:
        """Whether the process is known to run."""
        return self.is_local() and not self.has_ended() and not self.is_suspended()

    def kill(self) -> None:
        """Kill the process if it is on this node."""
        if self.is_local() and not self.has_ended():
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class FailureNotice:
    """Why the run ends, published by the rank that knows.

    Args:
        kind: class name of the error.
        text: its message.
        abort: the run is stalled, so every rank exits at once, without waiting for its training thread.
        reporter: with `abort`, the rank that prints the message.
        silent: with `abort`, the ranks without a heartbeat; they are killed.
    """

    kind: str
    text: str
    abort: bool = False
    reporter: int = 0
    silent: tuple[int, ...] = ()


def identity() -> dict[str, Any]:
    """The fields of a heartbeat that say which process this is."""
    pid = os.getpid()
    started = processes.started_ticks(pid)
    return {"host": socket.gethostname(), "pid": pid, "started": started, "namespace": processes.namespace()}


class HeartbeatThread(threading.Thread):
    """Publishes this rank's heartbeat once a second and reads those of the others.

    Args:
        own: returns this rank's heartbeat, given its number and whether the rank has finished.

    `seen` has the newest heartbeat of every rank, `notice` the failure notice; `rounds` counts completed exchanges. In
    large jobs the other ranks are read less often.
    """

    def __init__(self, rank: int, size: int, own: Callable[[int, bool], Heartbeat]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.size, self._own = rank, size, own
        self.seen = {other: Heartbeat() for other in range(size)}
        self.notice: FailureNotice | None = None
        self.rounds = 0
        self._to_publish: FailureNotice | None = None
        self._closed, self._wake = threading.Event(), threading.Event()
        self._store = distributed_c10d._get_default_store().clone()

    def publish(self, notice: FailureNotice) -> None:
        """Tell all ranks, unless another notice was published before. Does not wait."""
        self._to_publish = notice
        self._wake.set()

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
            self._store.set(_key(self.rank), json.dumps(asdict(self._own(self.rounds + 1, True))))

    def _exchange(self) -> None:
        if self._to_publish is not None and self.notice is None:
            published = self._store.compare_set(_NOTICE, "", json.dumps(asdict(self._to_publish)))
            self.notice = _decode(published)
        elif self.notice is None and self._store.check([_NOTICE]):
            self.notice = _decode(self._store.get(_NOTICE))
        heartbeat = self._own(self.rounds + 1, False)
        self._store.set(_key(self.rank), json.dumps(asdict(heartbeat)))
        if self.rounds % (1 + self.size // 16) == 0 or self.notice is not None:
            for other in range(self.size):
                key = _key(other)
                # get() waits for a key that does not exist yet.
                if self.seen[other].number or self._store.check([key]):
                    self.seen[other] = Heartbeat(**json.loads(self._store.get(key)))
        self.rounds += 1


def _key(rank: int) -> str:
    return f"cifar_dist/heartbeat/{rank}"


def _decode(text: bytes) -> FailureNotice:
    values = json.loads(text)
    return FailureNotice(**values | {"silent": tuple(values["silent"])})
