"""train.beton and test.beton in one folder: verified, prepared, and copied to a node's local disk.

A file counts only if its SHA-256 is the known one (see cifar10.BETON_FILES). FFCV maps a file and follows its pointers
unchecked: one that is cut short by a byte gives wrong images without an error. No torch is imported at the top, so that
`python -m cifar_dist.prepare` starts at once.
"""

import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import filelock

from cifar_dist import filesystem
from cifar_dist.data.cifar10 import BETON_FILES, TEST, TRAIN
from cifar_dist.errors import DataError
from cifar_dist.files import sha256_of_file
from cifar_dist.filesystem import sync_directory

Log = Callable[[str], None]
_TOTAL_BYTES = sum(file.num_bytes for file in BETON_FILES.values())
_SPARE_BYTES = 64_000_000  # left free on the disk


def ensure(data_dir: Path, source: str | Path, log: Log, rebuild: bool = False) -> None:
    """Verify the dataset in `data_dir`; prepare it from `source` (see prepare.sources.fetch) if a file is missing.

    One process prepares while others wait. A complete folder is only read, even if it is damaged. `rebuild` prepares
    the dataset in any case; the old files stay until the new ones are complete.

    Raises:
        DataError: the folder cannot be used, its content is damaged or not CIFAR-10, or no source works.
    """
    if rebuild or missing(data_dir):
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with _locked(data_dir, log):
                if rebuild or missing(data_dir):  # else another process was faster
                    _prepare(data_dir, source, log)
                    return
        except OSError as error:
            reason = "it is a file" if data_dir.is_file() else error.strerror or str(error)
            raise DataError(
                f"data.dir {data_dir} cannot be prepared: {reason} ({error.filename or data_dir}).\n"
                f"Choose a folder that can be written, with some 400 MB free: --data.dir DIR."
            ) from None
    verify(data_dir, log)


def missing(data_dir: Path) -> list[str]:
    """The names of the files that are not in `data_dir`."""
    return [name for name in BETON_FILES if not os.path.lexists(data_dir / name)]


def verify(data_dir: Path, log: Log) -> None:
    """Check both files against their SHA-256.

    Raises:
        DataError: names the first file that is wrong, and the command that prepares it again.
    """
    started = time.monotonic()
    for name in (TEST, TRAIN):  # the small one first: damage shows sooner
        if wrong := _problem(data_dir / name):
            raise DataError(
                f"{data_dir / name} is not usable: {wrong}.\nPut the right file back, or prepare the data anew:\n"
                f"  python -m cifar_dist.prepare --data.dir {shlex.quote(str(data_dir))} --rebuild True"
            )
    log(f"dataset {data_dir}: verified {_TOTAL_BYTES / 1e6:.0f} MB in {time.monotonic() - started:.1f} s")


def _problem(path: Path) -> str:
    """Why the file is not the one that its name stands for, as the end of a sentence; empty if it is."""
    right = BETON_FILES[path.name]
    try:
        size = path.stat().st_size
        if size != right.num_bytes:
            return f"it has {size:,} bytes, expected {right.num_bytes:,}: it was cut short or is another file"
        found = sha256_of_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found != right.sha256:
        return f"its SHA-256 is {found}, expected {right.sha256}"
    return ""


def stage(data_dir: Path, stage_dir: Path, source: str | Path, log: Log) -> Path:
    """The folder to read from on this node: `stage_dir` with a verified copy, else `data_dir`, verified.

    One process copies while others wait. A later run uses the copy again, without looking at `data_dir`. If `data_dir`
    is empty, it is prepared from `source` first (see `ensure`). If the copy cannot be made, the reason is logged.

    Raises:
        DataError: from `ensure`, about `data_dir`.
    """
    try:
        stage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = stage_dir.stat()
        # In a shared /tmp, another user may have made the folder.
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(0, "others may write there")
        with _locked(stage_dir, log):
            if not missing(stage_dir):
                try:
                    verify(stage_dir, log)
                    return stage_dir
                except DataError as error:
                    log(f"dataset {stage_dir}: this copy is damaged and is replaced: {str(error).splitlines()[0]}")
            ensure(data_dir, source, log)
            _copy(data_dir, stage_dir, log)
            log(f"dataset {data_dir}: copied to {stage_dir}")
            return stage_dir
    except OSError as error:
        log(f"dataset {data_dir}: read from there, not from a copy in {stage_dir}: {error.strerror or error}")
    ensure(data_dir, source, log)
    return data_dir


def _copy(data_dir: Path, stage_dir: Path, log: Log) -> None:
    for name in BETON_FILES:
        (stage_dir / name).unlink(missing_ok=True)  # a damaged copy, or one of a killed process
    with _new_files(stage_dir, log) as partial:
        for name in BETON_FILES:
            shutil.copyfile(data_dir / name, partial / name)


def _prepare(data_dir: Path, source: str | Path, log: Log) -> None:
    """Fetch CIFAR-10 from `source` and write both files. Call with the folder locked."""
    from cifar_dist.data.prepare import beton, sources  # here, as most runs only verify

    started = time.monotonic()
    with _new_files(data_dir, log) as partial:
        data = sources.fetch(source, log, scratch=partial, data_dir=data_dir)
        beton.write(partial / TRAIN, data.train_images, data.train_labels)
        beton.write(partial / TEST, data.test_images, data.test_labels)
    log(f"dataset {data_dir}: prepared from {data.origin} in {time.monotonic() - started:.1f} s")


def _locked(folder: Path, log: Log) -> AbstractContextManager[object]:
    """One process at a time, even if its holder is killed (see `filesystem.lock`)."""
    lock = filesystem.lock(folder / ".prepare.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"dataset {folder}: another process is preparing it; waiting")
        return lock.acquire()


@contextmanager
def _new_files(folder: Path, log: Log) -> Iterator[Path]:
    """A temporary folder to write both files to; at the end they are verified and moved to `folder`. Needs the lock.

    Raises:
        OSError: there is no room, or a file is wrong, e.g. because the disk is faulty; then none is moved.
    """
    if shutil.disk_usage(folder).free < _TOTAL_BYTES + _SPARE_BYTES:
        raise OSError(f"no room for {_TOTAL_BYTES / 1e6:.0f} MB")
    for stale in folder.glob(".partial-*"):  # of processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as place:
        partial = Path(place)
        yield partial
        for name in BETON_FILES:
            if wrong := _problem(partial / name):
                raise OSError(f"{name}, just written, is wrong: {wrong}")
        for name in BETON_FILES if missing(folder) else ():
            # A killed preparation leaves one file of the right content. One with other content is the user's own.
            if os.path.lexists(folder / name) and _problem(folder / name):
                aside = Path(tempfile.mkdtemp(prefix="set-aside-", dir=folder)) / name
                (folder / name).rename(aside)
                log(f"dataset {folder}: {name} was there, is not CIFAR-10's, and is moved to {aside}")
        for name in BETON_FILES:
            (partial / name).rename(folder / name)
            sync_directory(folder)
