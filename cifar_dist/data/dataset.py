"""The dataset of a run: train.beton and test.beton in one folder, verified on every machine, and their split.

A file counts only if its SHA-256 is the known one (see cifar10.BETON_FILES). FFCV maps a file and follows its pointers
unchecked: one that is cut short by a byte gives wrong images without an error. No torch is imported at the top, so that
`python -m cifar_dist.prepare` starts at once.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cifar_dist.config import NUM_TEST, DataConfig, EvalConfig
from cifar_dist.data.cifar10 import BETON_FILES
from cifar_dist.data.order import Indices, Split, split, stratified
from cifar_dist.errors import DataError

if TYPE_CHECKING:
    from cifar_dist.distributed import World

Log = Callable[[str], None]

TRAIN, TEST = "train.beton", "test.beton"
_PREPARE_TIMEOUT_S = 7200  # one process downloads and writes the dataset while the others wait


def prepared_folder(config: DataConfig, world: World, log: Log) -> Path:
    """Prepare or verify data.dir, and copy it to data.stage_dir if given; one process per node does it.

    Returns the folder that this rank reads.

    Raises:
        DataError: on every rank; the dataset is damaged, or no source works.
    """
    from cifar_dist.data.prepare.install import ensure, stage
    from cifar_dist.distributed import all_gather_text, run_and_sync_errors

    data_dir, stage_dir = config.dir, config.stage_dir

    def prepare() -> Path:
        try:
            if stage_dir is not None and stage_dir.resolve() != data_dir.resolve():
                return stage(data_dir, stage_dir, config.source, log)
            ensure(data_dir, config.source, log)
            return data_dir
        except DataError as error:
            if not missing(data_dir):
                raise  # it names the file
            raise DataError(f"data.dir {data_dir.resolve()} holds no dataset.\n{error}") from None

    folder = run_and_sync_errors(world, prepare, only_if=world.local_rank == 0, timeout_s=_PREPARE_TIMEOUT_S)
    # The ranks of a node have consecutive numbers.
    staged = all_gather_text("staged" if folder == stage_dir else "", world)[world.rank - world.local_rank]
    return stage_dir if stage_dir is not None and staged else data_dir


def read_split(config: DataConfig, folder: Path, world: World) -> Split:
    """Split the training set in `folder` by `config`."""
    return split(_labels(folder / TRAIN, world), config.train_on, config.subset)


def scored_samples(config: EvalConfig, folder: Path, world: World) -> Indices:
    """Indices of the test images to score: all, or eval.test_subset of them."""
    if config.test_subset is None:
        return np.arange(NUM_TEST)
    return stratified(_labels(folder / TEST, world), config.test_subset)


def _labels(path: Path, world: World) -> Indices:
    """Read by rank 0, returned on all ranks."""
    from cifar_dist.data.loader import read_labels
    from cifar_dist.distributed import broadcast_bytes, run_and_sync_errors

    labels = run_and_sync_errors(world, lambda: read_labels(path).tobytes(), only_if=world.is_main)
    return np.frombuffer(broadcast_bytes(labels or b"", world), np.int64)


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
        if wrong := problem(data_dir / name):
            raise DataError(
                f"{data_dir / name} is not usable: {wrong}.\nPut the right file back, or prepare the data anew:\n"
                f"  python -m cifar_dist.prepare --data.dir {shlex.quote(str(data_dir))} --rebuild True"
            )
    log(f"dataset {data_dir}: verified {total_bytes() / 1e6:.0f} MB in {time.monotonic() - started:.1f} s")


def problem(path: Path) -> str:
    """Why the file is not the one that its name stands for, as the end of a sentence; empty if it is."""
    right = BETON_FILES[path.name]
    try:
        size = path.stat().st_size
        if size != right.num_bytes:
            return f"it has {size:,} bytes, expected {right.num_bytes:,}: it was cut short or is another file"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found != right.sha256:
        return f"its SHA-256 is {found}, expected {right.sha256}"
    return ""


def total_bytes() -> int:
    return sum(file.num_bytes for file in BETON_FILES.values())
