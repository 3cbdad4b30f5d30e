"""Stop signals: SIGUSR1 (Slurm, slurm/train.sh), SIGTERM, SIGHUP (a closed terminal), SIGQUIT and Ctrl-C.

Before the first step there is nothing to save, and a signal raises StopError. Inside `deferred()` it sets a flag that
the training loop checks after every step. After an error it is ignored. This module does not import torch, so that the
handlers are installed before that import, during which a signal would kill the process without a message.
"""

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

from cifar_dist import environment
from cifar_dist.errors import PeerError, StopError, begin_shutdown, is_main_process, shutting_down, write_exit_code
from cifar_dist.process import LAUNCHER, STOP_SIGNALS, handled_signals, write_stderr

SAME_KEYSTROKE_S = 1.0
"""A second Ctrl-C within this time is the first one again, sent by both the terminal and the launcher."""
_POLL_S = 1.0
# From a signal before the first step to the exit of a process that waits inside torch, or in which a library has
# swallowed the exception.
_START_GRACE_S = 10.0
_ORPHAN_GRACE_S = 20.0  # for a worker to save after its launcher was killed


@dataclass
class _State:
    received: signal.Signals | None = None  # the first one
    interrupted_at: float | None = None  # the first Ctrl-C
    deferred: bool = False


_state = _State()


def install_handlers() -> None:
    """Handle the stop signals from now on, and the end of the launcher. Call in the main thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Python runs handlers only between bytecodes, but this process may wait inside torch: the wakeup fd tells a thread.
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in handled_signals():
        signal.signal(number, _handle)
    launcher = environment.number(LAUNCHER, os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
    threading.Thread(target=_watch, args=(reader, launcher), daemon=True).start()


def requested() -> signal.Signals | None:
    """The first stop signal, None without one."""
    return _state.received


def raise_if_requested() -> None:
    """Raise again after library code may have swallowed the exception of a signal.

    Raises:
        StopError: a stop signal was received.
    """
    if _state.received is not None:
        name = _state.received.name
        raise StopError(
            f"stopped by {name} before the first step or after the last; nothing was left to save. The same command "
            f"with --run.resume auto continues."
        )


@contextmanager
def deferred() -> Iterator[None]:
    """Signals raise nothing inside; the caller checks `requested`.

    Raises:
        StopError: at the start or at the end, if a signal was received that the caller did not act on.
    """
    _state.deferred = True
    try:
        raise_if_requested()
        yield
    except BaseException:
        begin_shutdown()
        raise
    finally:
        _state.deferred = False
    raise_if_requested()


def request() -> None:
    """Request a stop as SIGUSR1 does, from any thread. Has no effect outside `deferred`."""
    if _state.deferred and _state.received is None and not shutting_down():
        _state.received = signal.SIGUSR1


def _handle(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        now = time.monotonic()
        if _state.interrupted_at is not None and now - _state.interrupted_at > SAME_KEYSTROKE_S:
            os._exit(128 + signal.SIGINT)
        _state.interrupted_at = _state.interrupted_at or now
    if _state.received is not None or shutting_down():
        return
    _state.received = signal.Signals(number)
    if not _state.deferred:
        raise_if_requested()
    elif number == signal.SIGINT and is_main_process():
        write_stderr("\nstopping after this step; Ctrl-C again exits at once")


def _watch(reader: socket.socket, launcher: int | None) -> None:
    """End this process if it cannot stop by itself.

    Either a signal arrives while it waits for other ranks before the first step, or `launcher` (the process that
    started it as a worker; None without torchrun) was killed, which leaves its workers running.
    """
    signalled_at: float | None = None
    while launcher is None or os.getppid() == launcher:
        if select.select([reader], [], [], _POLL_S)[0] and set(reader.recv(64)) & set(STOP_SIGNALS):
            signalled_at = signalled_at or time.monotonic()
        overdue = signalled_at is not None and time.monotonic() - signalled_at > _START_GRACE_S
        if overdue and not _state.deferred and not shutting_down():
            write_exit_code(StopError.exit_code)
            os._exit(StopError.exit_code)
    if _state.interrupted_at is not None:
        os._exit(128 + signal.SIGINT)  # the launcher exited at a second Ctrl-C
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(PeerError.exit_code)
