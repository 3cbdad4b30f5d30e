"""Other processes of this node."""

from contextlib import suppress
from typing import Literal

import psutil

from cifar_dist.phase import started_ticks

_SUSPENDED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def state(pid: int, ticks: int | None) -> Literal["running", "suspended", "ended"]:
    """Of the process that has `pid` and started at `ticks`; suspended: by a signal or a debugger."""
    with suppress(psutil.Error):
        status = psutil.Process(pid).status()
        if started_ticks(pid) == ticks and status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "suspended" if status in _SUSPENDED else "running"
    return "ended"


def kill_process_tree(pid: int) -> None:
    """Kill a process and all its descendants, in whatever session, and wait up to 10 s for their end."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
