"""Part "loader": reading and augmenting batches on the CPU, against torchvision's DataLoader and FFCV's pipeline."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_dist.benchmarks.baselines import TorchvisionLoader, ffcv_batches
from cifar_dist.benchmarks.measure import Row, Table, Work, interleaved, processes
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import NUM_TRAIN, AugmentConfig
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Order
from cifar_dist.data.prepare import beton
from cifar_dist.data.prepare.beton import Images, Labels
from cifar_dist.training.precision import keep_freed_memory

READ, AUGMENTED = "this project, uint8", "this project, augmented"
FFCV, TORCHVISION = "FFCV's own augmentation", "torchvision v2 + DataLoader"
_LIKE_TORCHVISION = AugmentConfig(flip="random", translate=4, cutout=0)  # crop and flip as in TorchvisionLoader


def measure(config: BenchConfig) -> list[Table]:
    """One core, then all cores. `config.data.dir` must have been verified."""
    path = config.data.dir / "train.beton"
    arrays = beton.read_arrays(path)
    keep_freed_memory()  # as in training
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    tables = [_one_core(config, path, arrays)]
    os.sched_setaffinity(0, cpus)
    if len(cpus) > 1:
        tables += [_all_cores(config, path, arrays, min(len(cpus), 8)), _two_processes(config, path, cpus)]
    return tables


def _one_core(config: BenchConfig, path: Path, arrays: tuple[Images, Labels]) -> Table:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        started = time.perf_counter()
        batches = _open(path, config.batch_size, stack)
        next(batches)
        first = f"first batch after {time.perf_counter() - started:.1f} s"
        started = time.perf_counter()
        ffcv = ffcv_batches(path, config.batch_size)
        stack.callback(ffcv.close)
        next(ffcv)
        first += f"; of FFCV's own pipeline after {time.perf_counter() - started:.1f} s"
        cases: dict[str, Work] = {
            READ: partial(_take, batches),
            AUGMENTED: partial(_take, batches, _LIKE_TORCHVISION),
            f"{AUGMENTED}, cutout": partial(_take, batches, AugmentConfig()),
            FFCV: partial(_take_other, ffcv),
            TORCHVISION: partial(_take_other, TorchvisionLoader(arrays, config.batch_size, num_workers=0)),
        }
        rows = interleaved(cases, config.repeats, config.seconds)
    notes = [first, "uint8 or normalised float32; crop or translation by 4, and flip; FFCV's as in its example"]
    return Table(f"one core, batches of {config.batch_size}", "images/s", rows, TORCHVISION, notes=notes)


def _all_cores(config: BenchConfig, path: Path, arrays: tuple[Images, Labels], num: int) -> Table:
    """One process on all cores, with 1 and with `num` reading threads or worker processes."""
    torch.set_num_threads(num)
    cases, torchvision = dict[str, Work](), dict[str, TorchvisionLoader]()
    with ExitStack() as stack:
        for workers in (1, num):
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            batches = _open(path, config.batch_size, stack, workers)
            cases[f"{READ}, {name}"] = partial(_take, batches)
            if workers == num:
                cases[f"{AUGMENTED}, {name}"] = partial(_take, batches, _LIKE_TORCHVISION)
            reference = f"{TORCHVISION}, {name}"
            torchvision[reference] = TorchvisionLoader(arrays, config.batch_size, workers)
            cases[reference] = partial(_take_other, torchvision[reference])
            next(torchvision[reference])  # starts the worker processes

        def before(name: str) -> None:
            if name in torchvision:
                torchvision[name].drain()
            else:
                time.sleep(0.3)  # until torchvision's workers have filled their queues and are idle

        rows = interleaved(cases, config.repeats, config.seconds, before=before)
    notes = ["busy cores: of the process itself, without DataLoader's workers"]
    return Table("one process on all cores", "images/s", rows, reference, notes=notes)


def _two_processes(config: BenchConfig, path: Path, cpus: list[int]) -> Table:
    """One process and two, on a core each, interleaved: do they slow each other down?"""
    values: dict[str, list[float]] = {}
    with ExitStack() as stack:
        pools = []
        for cpu in cpus[:2]:
            os.sched_setaffinity(0, {cpu})  # inherited by the process
            pools.append(stack.enter_context(multiprocessing.get_context("spawn").Pool(1)))
        os.sched_setaffinity(0, cpus)
        for _ in range(config.repeats):
            for name, group in ((processes(1), pools[:1]), (f"{processes(2)}, sum", pools)):
                results = [pool.apply_async(_rate, (path, config.batch_size, config.seconds)) for pool in group]
                values.setdefault(name, []).append(sum(result.get() for result in results))
    rows = [Row(name, rates) for name, rates in values.items()]
    return Table("processes on a core each, augmented", "images/s", rows, rows[0].name)


def _rate(path: Path, batch_size: int, seconds: float) -> float:
    """In a process of its own: images/s of reading and augmenting with one thread for `seconds`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with ExitStack() as stack:
        batches = _open(path, batch_size, stack)
        for _ in range(20):
            _take(batches, _LIKE_TORCHVISION)
        start, images = time.perf_counter(), 0.0
        while (elapsed := time.perf_counter() - start) < seconds:
            images += _take(batches, _LIKE_TORCHVISION)
        return images / elapsed


def _open(path: Path, batch_size: int, stack: ExitStack, num_workers: int = 1) -> Iterator[tuple[int, Batch]]:
    """Endless pairs (epoch, batch) in the shuffled order of training."""
    loader = stack.enter_context(BetonLoader(path, torch.device("cpu"), num_workers))
    order = Order(np.arange(NUM_TRAIN), batch_size, seed=0)

    def batches() -> Generator[tuple[int, Batch]]:
        epoch = 0
        while True:
            for batch in loader.read(order.epoch(epoch), batch_size):
                yield epoch, batch
            epoch += 1

    return batches()


def _take(batches: Iterator[tuple[int, Batch]], config: AugmentConfig | None = None) -> float:
    """Read a batch and, given `config`, augment it; returns its number of images."""
    epoch, batch = next(batches)
    if config is not None:
        params = augment.sample_params(batch.indices, seed=0, epoch=epoch, config=config)
        augment.apply(batch.images, params, config.cutout, torch.float32)
    return float(len(batch.labels))


def _take_other(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Read a batch of torchvision or FFCV; returns its number of images."""
    return float(len(next(batches)[1]))
