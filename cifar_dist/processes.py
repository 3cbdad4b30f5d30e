"""What identifies a process, whether it is alive, and how this one starts and ends quickly.

Neither clocks nor process ids alone identify a process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from cifar_dist.errors import end


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside without garbage collection: modules are never garbage, and searching them for it takes 0.6 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind finds the frozen objects at the end and reports leaks
        gc.enable()


def run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Run `main` as the program of this process and exit with its code, without dismantling the interpreter.

    With torch, numba and FFCV loaded, dismantling takes a second. As Python does, this waits for threads, runs exit
    functions and flushes output. It does not flush files that are still open.
    """
    code: object = 0
    try:
        main()
    except SystemExit as finished:
        code = finished.code
    except Exception:  # noqa: BLE001 - Python's own report of it, and its exit code
        sys.excepthook(*sys.exc_info())
        code = 1
    if sys.gettrace() or sys.getprofile() or sys.flags.interactive:
        raise SystemExit(code)  # debuggers and profilers do their work afterwards
    end()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(_flush() or int(code or 0) & 0xFF)


def _flush() -> int:
    """Flush what Python and C have printed; 0, or the exit code that Python has where that fails."""
    failed = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            failed = 120
            with suppress(OSError, ValueError):
                print(f"error: {stream.name} cannot be written: {error}", file=sys.stderr)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).fflush(None)
    return failed


def place() -> tuple[str, str, str]:
    """Where this process's id means something: host name, boot of the kernel, and namespace of process ids.

    Cloned machines and containers share names; containers on one machine share the boot; process namespaces of
    different machines share numbers.
    """
    boot, namespace = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    return socket.gethostname(), boot, namespace


def started_ticks(pid: int) -> int | None:
    """When that process started, in clock ticks since boot, which setting the clock does not move; None if unknown."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def is_gone(pid: int, ticks: int | None) -> bool:
    """Whether the process that had `pid` here and started at `ticks` has ended; in doubt it has not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # somebody else's: it lives
    fields = _stat(pid)  # empty where /proc hides the processes of others
    return bool(fields) and (fields[0] in "ZX" or (ticks is not None and int(fields[19]) != ticks))


def state(pid: int) -> str:
    """R, S, D, T (stopped), Z ... as in /proc; empty if there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def age_s() -> float:
    """Seconds since this process started, whatever was done to the clock meanwhile."""
    ticks = started_ticks(os.getpid())
    if ticks is None:  # no /proc
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def kill_family(pid: int) -> None:
    """Kill a process and all that descend from it, in whatever session, and wait until they are gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        family = [*leader.children(recursive=True), leader]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=10)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there are none to be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
