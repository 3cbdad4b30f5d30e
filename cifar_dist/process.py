"""This process and those that it starts: fast imports, fast exit, blocked stop signals, and how to kill them."""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

from cifar_dist.errors import begin_shutdown

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


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


def run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Run `main` as this process's program and exit with its code by os._exit, without finalizing the interpreter.

    Finalization takes a second with torch, numba and FFCV loaded. Like Python, this waits for non-daemon threads, runs
    atexit functions and flushes stdout and stderr. Files that are still open are not flushed.
    """
    code: object = 0
    try:
        main()
    except SystemExit as finished:
        code = finished.code
    except BrokenPipeError as error:  # the reader of stdout is gone, as after `--help | head`
        code = f"error: {error}"
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
        try:
            stream.flush()
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
        except OSError as error:
            code = 120  # as Python does
            with suppress(OSError):
                os.write(2, f"error: {stream.name} cannot be written: {error.strerror}\n".encode())
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).fflush(None)
    os._exit(int(code or 0) & 0xFF)


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
