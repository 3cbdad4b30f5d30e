"""Part "loader": reading and augmenting batches on the CPU, against torchvision's DataLoader and FFCV's pipeline."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from cifar_dist.benchmarks.baselines import ffcv_batches, torchvision_batches, without_prefetched
from cifar_dist.benchmarks.measure import Table, interleaved
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import NUM_TRAIN, AugmentConfig
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Order
from cifar_dist.training.precision import keep_freed_memory

AUGMENTED, TORCHVISION = "this project, augmented", "torchvision v2 + DataLoader"
_LIKE_TORCHVISION = AugmentConfig(flip="random", translate=4, cutout=0)


def measure(config: BenchConfig) -> list[Table]:
    """One core, then all cores. `config.data_dir` must have been verified."""
    keep_freed_memory()  # as in training
    cpus, tables = sorted(os.sched_getaffinity(0)), list[Table]()
    for cores in (cpus[-1:], cpus)[: len(cpus)]:
        os.sched_setaffinity(0, cores)
        tables.append(_measure(config, min(len(cores), 8)))
    return tables


def _measure(config: BenchConfig, num: int) -> Table:
    """One process with `num` reading threads and `num` for augmentation; above 1, as many workers of DataLoader."""
    torch.set_num_threads(num)
    path, size, num_workers = config.data_dir / "train.beton", config.batch_size, num if num > 1 else 0
    with ExitStack() as stack:
        torchvision = torchvision_batches(path, size, num_workers)
        next(torchvision)  # starts the workers, while this process has few threads
        batches = _open(path, size, num, stack)
        works: dict[str, Callable[[], object]] = {
            "this project, uint8": partial(take, batches),
            AUGMENTED: partial(take, batches, _LIKE_TORCHVISION),
            f"{AUGMENTED}, cutout": partial(take, batches, AugmentConfig()),
            "FFCV's own augmentation": partial(next, ffcv_batches(path, size, num)),
            TORCHVISION: partial(next, torchvision),
        }
        if num > 1:
            works["this project, uint8, one reading thread"] = partial(take, _open(path, size, 1, stack))
        rows = interleaved(
            {name: (size, work) for name, work in works.items()},
            config,
            lambda name: without_prefetched(torchvision, num_workers if name == TORCHVISION else 0),
        )
    notes = ["uint8 or normalised float32; crop or translation by 4, and flip; FFCV's as in its example"]
    if num > 1:
        notes.append(f"{num} threads, or workers of DataLoader")
    title = f"{f'{num} cores' if num > 1 else 'one core'}, batches of {size}"
    return Table(title, "images/s", rows, TORCHVISION, notes=notes)


def _open(path: Path, batch_size: int, num_workers: int, stack: ExitStack) -> Iterator[tuple[int, Batch]]:
    """Endless pairs (epoch, batch) in the shuffled order of training."""
    loader = stack.enter_context(BetonLoader(path, torch.device("cpu"), num_workers))
    order = Order(np.arange(NUM_TRAIN), batch_size, seed=0)
    return ((epoch, batch) for epoch in count() for batch in loader.read(order.epoch(epoch), batch_size))


def take(
    batches: Iterator[tuple[int, Batch]],
    config: AugmentConfig | None = None,
    dtype: torch.dtype = torch.float32,
    augment_batch: Callable[..., object] = augment.augment_batch,
) -> None:
    """Read a batch and, given `config`, augment it."""
    epoch, batch = next(batches)
    if config is not None:
        keys = augment.epoch_keys(0, epoch, batch.indices.device)
        augment_batch(batch.images, batch.indices, keys, config, dtype, None)
