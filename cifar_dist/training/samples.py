"""The dataset of a run, there and verified on every machine, and which of its samples are for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cifar_dist.config import NUM_TEST, DataConfig, EvalConfig
from cifar_dist.data import beton, dataset, staging
from cifar_dist.data.order import Indices, Split, split, stratified
from cifar_dist.distributed import World, all_reduce_sum, broadcast_bytes, together
from cifar_dist.errors import DataError

_PREPARE_TIMEOUT_S = 7200  # for one process to download and write the dataset while the others wait


def folder_of(data_dir: Path, stage_dir: Path | None, source: str, world: World, say: Callable[[str], None]) -> Path:
    """Have one process of each machine prepare or verify `data_dir`, and copy it to `stage_dir` if one is given.

    Returns the folder that this rank is to read from.

    Raises:
        DataError: the dataset is damaged, or cannot be had; on every rank.
    """

    def ready() -> bool:
        try:
            if stage_dir is not None and stage_dir.resolve() != data_dir.resolve():
                return staging.stage(data_dir, stage_dir, source, say) == stage_dir
            dataset.ensure(data_dir, source, say)
            return False
        except DataError as error:
            if (data_dir / dataset.MANIFEST).exists():
                raise  # it names the file
            raise DataError(f"data.dir {data_dir.resolve()} holds no dataset.\n{error}") from None

    staged = together(world, ready, at_work=world.local_rank == 0, timeout_s=_PREPARE_TIMEOUT_S)
    # The ranks of a machine follow one another; the first of them knows.
    told = torch.zeros(world.size, dtype=torch.int64)
    if staged:
        told[world.rank : world.rank + world.local_size] = 1
    found = all_reduce_sum(told, world)[world.rank]
    return stage_dir if stage_dir is not None and bool(found) else data_dir


def split_of(config: DataConfig, folder: Path, world: World) -> Split:
    """Cut the training set in `folder` as `config` says."""
    return split(_labels(folder / dataset.TRAIN, world), config.train_on, config.subset)


def scored_samples(config: EvalConfig, folder: Path, world: World) -> Indices:
    """What is scored of the test set in `folder`: all of it, or the part that `config` asks for."""
    if config.test_subset is None:
        return np.arange(NUM_TEST)
    return stratified(_labels(folder / dataset.TEST, world), config.test_subset)


def _labels(path: Path, world: World) -> Indices:
    """Read on rank 0, for all ranks."""
    labels = together(world, lambda: beton.read_labels(path).tobytes(), at_work=world.rank == 0)
    return np.frombuffer(broadcast_bytes(labels or b"", world), np.int64)
