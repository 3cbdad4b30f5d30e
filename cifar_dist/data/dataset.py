"""The dataset of a run, on every rank: the folder to read from, the split, and the test images to score."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar_dist.config import NUM_TEST, DataConfig, EvalConfig
from cifar_dist.data import cifar10
from cifar_dist.data.loader import read_labels
from cifar_dist.data.order import Indices, Split, split, stratified
from cifar_dist.distributed import World, all_gather_text, broadcast_bytes, run_and_sync_errors
from cifar_dist.errors import DataError

_PREPARE_TIMEOUT_S = 7200  # one process downloads and writes the dataset while the others wait


def prepared_folder(config: DataConfig, world: World, log: Callable[[str], None]) -> Path:
    """Prepare or verify data.dir, and copy it to data.stage_dir if given; one process per node does it.

    Returns the folder that this rank reads.

    Raises:
        DataError: on every rank; the dataset is damaged, or no source works.
    """
    from cifar_dist.data.prepare.install import ensure, missing, stage

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
    return split(_labels(folder / cifar10.TRAIN, world), config.train_on, config.subset)


def scored_samples(config: EvalConfig, folder: Path, world: World) -> Indices:
    """Indices of the test images to score: all, or eval.test_subset of them."""
    if config.test_subset is None:
        return np.arange(NUM_TEST)
    return stratified(_labels(folder / cifar10.TEST, world), config.test_subset)


def _labels(path: Path, world: World) -> Indices:
    """Read by rank 0, returned on all ranks."""
    labels = run_and_sync_errors(world, lambda: read_labels(path).tobytes(), only_if=world.is_main)
    return np.frombuffer(broadcast_bytes(labels or b"", world), np.int64)
