"""This process and those that it starts: output, fast imports, fast exit, stop signals, and how to kill them."""

import atexit
import ctypes
import errno
import gc
import getpass
import io
import os
import select
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from cifar_dist.errors import begin_shutdown

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
LAUNCHER = "CIFAR_DIST_LAUNCHER"
"""Environment variable: the process id of `cifar_dist.cluster.launcher`."""
SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable of torchrun: seconds from a stop signal until it kills workers; set by the launcher."""
_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)  # a closed pipe, a closed terminal, a closed descriptor
_READER_S = 5.0


class _Output(io.FileIO):
    """A standard stream that never raises, as a run does not end because nobody reads its output.

    What cannot be written is dropped; `error` is the first reason other than a missing reader. `wait_s`: how long a
    reader may read nothing, such as a pager or a terminal after Ctrl-S, before lines are dropped; None: for ever.
    """

    def __init__(self, descriptor: int, name: str, wait_s: float | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name
        self.error: OSError | None = None
        self._wait_s, self._drops = wait_s, False

    def write(self, data: Any) -> int:
        """Write or drop the first part of `data`. Returns its number of bytes."""
        part = memoryview(data)[: select.PIPE_BUF]  # so much fits into any pipe that is ready
        try:
            ready = select.select([], [self], [], 0 if self._drops else self._wait_s)[1]
            self._drops = not ready
            if ready:
                return super().write(part) or 0
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.error = self.error or error
        return len(part)


def protect_output(wait_s: float | None = None) -> None:
    """Replace stdout and stderr by streams that never raise (see `_Output`), whatever the text.

    Closed standard descriptors are opened: the next file would get their number, and what C code prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        buffer = io.BufferedWriter(_Output(descriptor, f"<{name}>", wait_s))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


def provide_home() -> None:
    """Give libraries a folder for settings and caches where the user's home is missing or cannot be written.

    They print warnings or end the run without one, as in containers. A home that can only be read stays HOME, as it
    may hold logins.
    """
    home, exists = Path(), False
    with suppress(RuntimeError, OSError):  # a user without HOME and without an entry in /etc/passwd; no permission
        home = Path.home()
        exists = home.is_dir()
    if exists:
        os.environ["HOME"] = str(home)
        if os.access(home, os.W_OK | os.X_OK):
            return
    try:
        folder = Path(tempfile.gettempdir(), f"cifar_dist-home-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # in a shared folder another user may have made it, or a link
        if (stat.S_IFMT(found.st_mode), found.st_uid) != (stat.S_IFDIR, os.getuid()) or found.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix="cifar_dist-home-"))
    except OSError:
        return  # of the temporary folder others will complain
    if not exists:
        os.environ["HOME"] = str(folder)
    os.environ.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
    os.environ.setdefault("XDG_CONFIG_HOME", str(folder / "config"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


@contextmanager
def quiet_descriptors() -> Iterator[None]:
    """Descriptors 1 and 2 are /dev/null inside, and in processes that are started inside."""
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        yield
    finally:
        for descriptor, old in zip((1, 2), saved, strict=True):
            os.dup2(old, descriptor)
        for descriptor in (*saved, null):
            os.close(descriptor)


def write_stderr(text: str) -> None:
    """Write a line from a signal handler or a thread, where `sys.stderr` may be locked; never raises."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextmanager
def quick_imports() -> Iterator[None]:
    """Disable garbage collection for imports inside, which saves 0.6 s: modules are never garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # otherwise nanobind reports the frozen objects as leaks
        gc.enable()


def run_and_exit(main: Callable[[], None], *, needs_output: bool = True) -> NoReturn:
    """Run `main` as this process's program and exit with its code by os._exit, without finalizing the interpreter.

    Finalization takes a second with torch, numba and FFCV loaded. Like Python, this waits for non-daemon threads, runs
    atexit functions and flushes stdout and stderr. Files that are still open are not flushed.

    Args:
        needs_output: its output is its result. Then it waits for a slow reader, and exits with 120, as Python does, if
            the output cannot be written, as on a full disk.
    """
    protect_output(None if needs_output else _READER_S)
    provide_home()
    code: object = 0
    try:
        main()
    except SystemExit as finished:
        code = finished.code
    except Exception:  # noqa: BLE001 - printed as Python prints it
        sys.excepthook(*sys.exc_info())
        code = 1
    if sys.gettrace() or sys.getprofile() or sys.flags.interactive:
        raise SystemExit(code)  # debuggers and profilers need a normal exit
    begin_shutdown()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # closed, or replaced
            stream.flush()
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, _Output) and raw.error is not None:
            code = code or (120 if needs_output else 0)
            write_stderr(f"error: {raw.name} cannot be written: {raw.error.strerror}")
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).fflush(None)
    os._exit(int(code or 0) & 0xFF)


def handled_signals() -> list[signal.Signals]:
    """`STOP_SIGNALS` without hangup and quit where these were ignored when this process started, as by nohup.

    The others are handled even then: shells ignore Ctrl-C for what they start in the background, slurm/ ignores SIGUSR1
    until Python handles it, and torchrun passes a hangup on to its workers, which would be killed if they ignored it.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHER not in os.environ
    kept = () if under_torchrun else (signal.SIGHUP, signal.SIGQUIT)
    return [number for number in STOP_SIGNALS if number not in kept or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block stop signals in processes started inside: Slurm sends them to every process of a job step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_process_tree(pid: int) -> None:
    """Kill a process and all its descendants, in whatever session, and wait up to 10 s for their end.

    With the id of this process only its descendants.
    """
    with suppress(psutil.NoSuchProcess):
        processes = psutil.Process(pid).children(recursive=True)
        if pid != os.getpid():
            processes.append(psutil.Process(pid))
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
