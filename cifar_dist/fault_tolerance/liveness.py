"""Which run directories a living process owns, told without disturbing it. Does not import torch."""

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from filelock import SoftFileLease

from cifar_dist.fault_tolerance.run_lock import LOCK, Owner, owner
from cifar_dist.filesystem import LEASE_S, REFRESH_S

WATCH_S = 3 * REFRESH_S
_MAX_CLOCK_SKEW_S = 3600.0
_INITIAL_NAMESPACE = f"{0xEFFFFFFC:x}"  # of process ids; filelock names only others


def living_owners(directories: Iterable[Path]) -> dict[Path, Owner]:
    """The owner of each directory whose owner lives.

    A process of this machine is looked up. One of another machine lives if it refreshed its marker within `LEASE_S`, by
    this machine's clock. As clocks differ, older markers are watched for up to `WATCH_S`, all at once, but those that
    are older than an hour.
    """
    living, watched = dict[Path, Owner](), dict[Path, tuple[Owner, float]]()
    for directory in directories:
        found = owner(directory) if os.path.lexists(directory / LOCK) else None
        refreshed = _mtime(directory)
        if found is None or refreshed is None:
            continue
        lives, age_s = _lives_here(directory, found), abs(time.time() - refreshed)
        if lives or (lives is None and age_s < LEASE_S):
            living[directory] = found
        elif lives is None and age_s < _MAX_CLOCK_SKEW_S:
            watched[directory] = found, refreshed
    deadline = time.monotonic() + WATCH_S
    while watched and time.monotonic() < deadline:
        time.sleep(REFRESH_S / 4)
        for directory, (found, refreshed) in list(watched.items()):
            if _mtime(directory) not in (refreshed, None):
                living[directory] = found
                del watched[directory]
    return living


def _mtime(directory: Path) -> float | None:
    try:
        with (directory / LOCK).open("rb") as file:  # network file systems ask the server when a file is opened
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _lives_here(directory: Path, found: Owner) -> bool | None:
    """Whether the owner is a living process of this machine; None if that cannot be told here."""
    record = SoftFileLease(directory / LOCK).owner
    if record is None or found.host != socket.gethostname():
        return None
    namespace = record.hostname.partition("?pidns-")[2] or _INITIAL_NAMESPACE
    if namespace != f"{Path('/proc/self/ns/pid').stat().st_ino:x}":  # another container
        return None
    try:
        fields = Path(f"/proc/{record.pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None if psutil.pid_exists(record.pid) else False  # None: of another user, hidden by the system
    # The 22nd field is the start in clock ticks since boot, which filelock notes in the lower 64 bits.
    same = record.start is None or record.start % 2**64 == int(fields[19])
    return same and fields[0] not in (b"Z", b"X")
