"""A copy of the prepared dataset on a machine's own disk, so that shared file systems are read once per machine."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from cifar_dist.data import dataset
from cifar_dist.data.dataset import Say
from cifar_dist.errors import DataError

_SPARE_BYTES = 64_000_000


def stage(data_dir: Path, stage_dir: Path, source: str, say: Say) -> Path:
    """The folder to read from on this machine: `stage_dir` with a verified copy, else `data_dir`, verified.

    The copy is made by one process while others wait, renamed into place when it is complete, and used again by later
    runs. `data_dir` is prepared from `source` when it is empty (see dataset.ensure).

    Raises:
        DataError: from dataset.ensure, about `data_dir`. What prevents the copy is said, and is no error.
    """
    try:
        stage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(stage_dir)
        with dataset.locked(stage_dir, say):
            if not _is_staged(stage_dir, source, say):
                manifest = dataset.ensure(data_dir, source, say)
                _copy(data_dir, stage_dir, sum(entry["size_bytes"] for entry in manifest.files.values()), say)
                _verify_copy(stage_dir, source, say)
            return stage_dir
    except OSError as error:
        say(f"dataset {data_dir}: read from there, not from a copy in {stage_dir}: {error.strerror or error}")
    dataset.ensure(data_dir, source, say)
    return data_dir


def _refuse_foreign(folder: Path) -> None:
    """Temporary folders have names that anyone can guess."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "others may write there")


def _is_staged(stage_dir: Path, source: str, say: Say) -> bool:
    if not os.path.lexists(stage_dir / dataset.MANIFEST):
        return False
    try:
        dataset.ensure(stage_dir, source, say)
    except DataError as error:
        say(f"dataset {stage_dir}: this copy is damaged, and made anew: {str(error).splitlines()[0]}")
        (stage_dir / dataset.MANIFEST).unlink()
        return False
    return True


def _verify_copy(stage_dir: Path, source: str, say: Say) -> None:
    try:
        dataset.ensure(stage_dir, source, say)
    except DataError as error:
        raise OSError(f"the copy is not what was copied: {str(error).splitlines()[0]}") from None


def _copy(data_dir: Path, stage_dir: Path, size_bytes: int, say: Say) -> None:
    for name in dataset.COUNTS:
        (stage_dir / name).unlink(missing_ok=True)  # without a manifest it is the rest of an attempt
    for stale in stage_dir.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(stage_dir).free < size_bytes + _SPARE_BYTES:
        raise OSError(f"no room for {size_bytes / 1e6:.0f} MB")
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=stage_dir))
    try:
        for name in (*dataset.COUNTS, dataset.MANIFEST):
            shutil.copyfile(data_dir / name, partial / name)
        dataset.install(partial, stage_dir, say)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"dataset {data_dir}: copied to {stage_dir}")
