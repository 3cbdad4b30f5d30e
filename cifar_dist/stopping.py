"""The wish to stop, from Slurm, a scheduler or a person: SIGUSR1, SIGTERM and Ctrl-C, taken note of from the start.

Nothing here needs torch, so that the handlers are in place before it is imported: until then a signal would kill the
process without a word. Before the first step there is nothing to save, and the wish is an exception at once; inside
`hold` it is a note, which the training loop asks for after every step; once an error has ended the run, it is nothing.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cifar_dist.errors import PeerError, StopError, end, ending, leave_code, speaks

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
LAUNCHER = "CIFAR_DIST_LAUNCHER"
"""The environment variable with the process id of `cifar_dist.launch`."""
SAME_KEYSTROKE_S = 1.0
"""Within so long, a second Ctrl-C is the first one, which came by the terminal and by the launcher."""
_WATCH_S, _START_GRACE_S, _ORPHAN_GRACE_S = 1.0, 10.0, 20.0


@dataclass
class _Noted:
    first: signal.Signals | None = None
    interrupted_at: float | None = None
    held: bool = False


_noted = _Noted()


def listen() -> None:
    """Take note of the signals from now on, in the main thread, and of the end of the launcher."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # A handler runs only when Python does, but a process may wait for others inside torch: the bytes tell the thread.
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _note)
    atexit.register(_ignore)
    threading.Thread(target=_watch, args=(reader, launcher_pid()), daemon=True).start()


def wish() -> signal.Signals | None:
    """The first signal that asked this process to stop."""
    return _noted.first


def check() -> None:
    """Raise what a signal has raised before, should that have been swallowed.

    Raises:
        StopError: there was a signal.
    """
    if _noted.first is not None:
        raise _outside_of_steps(_noted.first)


@contextmanager
def hold() -> Iterator[None]:
    """Inside, a signal raises nothing: whoever asks `wish` acts on it.

    Raises:
        StopError: at the start or at the end, when there was a signal that nobody acted on.
    """
    _noted.held = True
    try:
        check()
        yield
    except BaseException:
        end()
        raise
    finally:
        _noted.held = False
    check()


def ask() -> None:
    """Note the wish to stop as if SIGUSR1 had come, from any thread; outside of `hold` it does nothing."""
    if _noted.held and _noted.first is None and not ending():
        _noted.first = signal.SIGUSR1


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started inside do not see the signals, which Slurm sends to every process of a job step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        now = time.monotonic()
        if _noted.interrupted_at is not None and now - _noted.interrupted_at > SAME_KEYSTROKE_S:
            os._exit(128 + signal.SIGINT)
        _noted.interrupted_at = _noted.interrupted_at or now
    if _noted.first is not None or ending():
        return
    _noted.first = signal.Signals(number)
    if not _noted.held:
        raise _outside_of_steps(_noted.first)
    if number == signal.SIGINT and speaks():
        os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")


def _ignore() -> None:
    """Python gives signals back to the system as it ends, which would then kill this process: 75 would become -10."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _outside_of_steps(number: signal.Signals) -> StopError:
    return StopError(f"stopped by {number.name} before the first step or after the last; nothing was left to save.")


def launcher_pid() -> int | None:
    """The process that started this one for torchrun; None outside of it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ.get(LAUNCHER, os.getppid()))


def _watch(reader: socket.socket, launcher: int | None) -> None:
    """End this process when it cannot stop by itself.

    That is, when a signal comes while it waits for others before the first step; or some time after `launcher` has
    ended, which leaves its workers behind when it is killed.
    """
    asked_at: float | None = None
    while launcher is None or os.getppid() == launcher:
        if select.select([reader], [], [], _WATCH_S)[0] and set(reader.recv(64)) & set(SIGNALS):
            asked_at = asked_at or time.monotonic()
        waited = asked_at is not None and time.monotonic() - asked_at > _START_GRACE_S
        if waited and _noted.first is None and not _noted.held and not ending():
            leave_code(StopError.exit_code)
            os._exit(StopError.exit_code)
    if _noted.interrupted_at is not None:
        os._exit(128 + signal.SIGINT)  # the launcher left at a second Ctrl-C
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(PeerError.exit_code)
