"""The dataset of a run, there and verified on every machine, and which of its samples are for what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cifar_dist.config import DataConfig
from cifar_dist.data import beton, dataset
from cifar_dist.data.order import Split, split
from cifar_dist.distributed import World, together
from cifar_dist.errors import DataError

_PREPARE_TIMEOUT_S = 7200  # for one process to download and write the dataset while the others wait


def split_of(config: DataConfig, folder: Path, world: World, say: Callable[[str], None]) -> Split:
    """Have one process of each machine prepare or verify `folder`, then cut the training set as `config` says.

    Raises:
        DataError: the dataset is damaged, or cannot be had; on every rank.
    """
    ensure = partial(_ensure, folder, config.source, say)
    together(world, ensure, at_work=world.local_rank == 0, timeout_s=_PREPARE_TIMEOUT_S)
    _, labels = beton.read_arrays(folder / dataset.TRAIN)
    return split(labels, config.train_on, config.subset)


def _ensure(folder: Path, source: str, say: Callable[[str], None]) -> None:
    try:
        dataset.ensure(folder, source, say)
    except DataError as error:
        if (folder / dataset.MANIFEST).exists():
            raise  # it names the file
        raise DataError(f"data.dir {folder.resolve()} holds no dataset.\n{error}") from None
