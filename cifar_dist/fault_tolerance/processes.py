"""Identity and state of other processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def namespace() -> str:
    """Equal for two processes if a process id means the same to both: kernel boot and pid namespace.

    Containers on one machine share the boot id, and namespaces of different machines share numbers. Empty if hidden.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def started_ticks(pid: int) -> int | None:
    """Start time in clock ticks since boot, None if unknown. psutil's create_time moves with the system clock."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def status(pid: int, ticks: int | None) -> str:
    """psutil's status of the process that has `pid` and started at `ticks`; empty if it has ended."""
    if started_ticks(pid) != ticks:
        return ""
    with suppress(psutil.Error):
        return str(psutil.Process(pid).status())
    return ""


def kill_process_tree(pid: int) -> None:
    """Kill a process and all its descendants, in whatever session, and wait up to 10 s for their end."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
