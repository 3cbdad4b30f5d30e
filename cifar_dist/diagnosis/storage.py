"""The dataset, and the room and speed of the folders that training writes to."""

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from cifar_dist.data.prepare.install import missing, verify
from cifar_dist.diagnosis.checks import Finding, Folders
from cifar_dist.filesystem import lock, sync_directory

_PROBE_BYTES = 64_000_000  # about a checkpoint of the largest built-in network
_SLOW_MB_S = 10  # such a checkpoint then takes more than 6 s
# Free bytes: four checkpoints (the newest two, the best, the one that is being written) and room for logs; the archive
# of CIFAR-10 and both .beton files; compiled code.
_RUNS_BYTES, _DATA_BYTES, _TEMPORARY_BYTES = 300_000_000, 400_000_000, 100_000_000


def data(folders: Folders) -> Iterator[Finding]:
    """Both .beton files, by their SHA-256."""
    folder = shlex.quote(str(folders.data))
    if absent := missing(folders.data):
        found = f"{folders.data.absolute()} has no {' and no '.join(absent)}; training would download CIFAR-10"
        yield Finding("warning", found, f"python -m cifar_dist.prepare --data.dir {folder}")
        return
    lines: list[str] = []
    verify(folders.data, lines.append)
    yield Finding("ok", lines[-1])


def disk(folders: Folders) -> Iterator[Finding]:
    """Room, writing and locking. A complete data folder is only read."""
    yield _folder("run folder", folders.runs, _RUNS_BYTES, "--run.dir names another")
    if missing(folders.data):
        yield _folder("data folder", folders.data, _DATA_BYTES, "--data.dir names another")
    yield _folder("temporary folder", Path(tempfile.gettempdir()), _TEMPORARY_BYTES, "TMPDIR names another")


def _folder(kind: str, path: Path, needed: int, other: str) -> Finding:
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))  # noqa: PTH110 - Path raises PermissionError
    name, advice = f"{kind} {place}", f"Free some room or choose another folder: {other}"
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place)
    if free < needed:
        return Finding("problem", f"{name}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed", advice)
    if inodes.f_files and not inodes.f_favail:
        return Finding("problem", f"{name}: no inode is free, so no file can be made", advice)
    try:
        seconds, has_locks = _write(place)
    except OSError as error:
        return Finding("problem", f"{name} cannot be written: {error.strerror or error}", advice)
    speed = _PROBE_BYTES / 1e6 / seconds
    found = f"{name}: {free / 1e9:.1f} GB free, writes {speed:.0f} MB/s with fsync"
    found += "" if has_locks else ", has no file locks (leases take their place)"
    if speed < _SLOW_MB_S:
        return Finding("warning", f"{found}, which is slow", f"Each checkpoint waits for it. Choose another: {other}")
    return Finding("ok", found)


def _write(place: Path) -> tuple[float, bool]:
    """Seconds for `_PROBE_BYTES`, and whether there are file locks."""
    content = os.urandom(1_000_000)  # not to be compressed
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
        started = time.monotonic()
        with Path(folder, "probe").open("wb") as file:
            for _ in range(_PROBE_BYTES // len(content)):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(Path(folder))
        return time.monotonic() - started, not isinstance(lock(Path(folder, "lock")), filelock.SoftFileLease)
