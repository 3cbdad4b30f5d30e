"""Batches to measure, and what `bench loader` starts to read them in processes of their own: `rate` and `memory`."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.measure import Work
from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment, beton
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Order
from cifar_dist.distributed import keep_freed_memory
from cifar_dist.processes import run_and_exit

AUGMENTED, TORCHVISION = "this project, augmented", "torchvision v2 + DataLoader"
# Crop and flip as in torchvision's pipeline; FFCV's has cutout as well, and so has this project's unless told.
LIKE_TORCHVISION = AugmentConfig(flip="random", translate=4, cutout=0)


def batches(loader: BetonLoader, batch_size: int) -> Generator[tuple[int, Batch]]:
    """(epoch, batch) without end, in the shuffled order of training."""
    order = Order(np.arange(50_000), batch_size=1, seed=0)
    epoch = 0
    while True:
        reading = loader.read(order.epoch(epoch)[: 50_000 // batch_size * batch_size], batch_size)
        try:
            for batch in reading:
                yield epoch, batch
        finally:
            reading.close()
        epoch += 1


def take(mine: Iterator[tuple[int, Batch]], config: AugmentConfig | None = None) -> float:
    """Read a batch, and augment it as `config` says; returns its number of images."""
    epoch, batch = next(mine)
    if config is not None:
        draws = augment.draw(batch.indices, seed=0, epoch=epoch, config=config)
        augment.apply(batch.images, draws, config.cutout, torch.float32)
    return float(len(batch.labels))


def take_theirs(theirs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Read a batch of others'; returns its number of images."""
    return float(len(next(theirs)[1]))


def rate(path: Path, batch_size: int, seconds: float) -> None:
    """Read and augment on one thread for `seconds` at each line of stdin, and answer with images/s."""
    torch.set_num_threads(1)
    with BetonLoader(path, torch.device("cpu")) as loader:
        mine = batches(loader, batch_size)
        for _ in range(20):
            take(mine, LIKE_TORCHVISION)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() != "go":
                break
            start, done = time.perf_counter(), 0.0
            while (elapsed := time.perf_counter() - start) < seconds:
                done += take(mine, LIKE_TORCHVISION)
            print(done / elapsed, flush=True)
        mine.close()


def memory(path: Path, batch_size: int, name: str) -> None:
    """Print the MB that reading by the way `name` adds to what this process and its children have written to."""
    before = _written_mb()
    with ExitStack() as stack:
        work = _reader(path, batch_size, name, stack)
        deadline, highest = time.perf_counter() + 1, before
        while time.perf_counter() < deadline:
            for _ in range(5):
                work()
            highest = max(highest, _written_mb())
    print(highest - before)


def _reader(path: Path, batch_size: int, name: str, stack: ExitStack) -> Work:
    if name == AUGMENTED:
        mine = batches(stack.enter_context(BetonLoader(path, torch.device("cpu"))), batch_size)
        stack.callback(mine.close)
        return partial(take, mine, LIKE_TORCHVISION)
    images, labels = beton.read_arrays(path)
    workers = 2 if name.endswith("2 workers") else 0
    return partial(take_theirs, baselines.torchvision_batches(images, labels, batch_size, workers))


def _written_mb() -> float:
    process = psutil.Process()
    return sum(_dirty_bytes(one.pid) for one in [process, *process.children()]) / 1e6


def _dirty_bytes(pid: int) -> int:
    """Of the pages that several processes share, each counts its part, where the kernel tells."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith(" kB")}
    return 1024 * sizes.get("Pss_Dirty", sizes.get("Private_Dirty", 0))


def main() -> None:
    what, path, batch_size, more = sys.argv[1:]
    keep_freed_memory()  # as in training
    if what == "rate":
        rate(Path(path), int(batch_size), float(more))
    else:
        memory(Path(path), int(batch_size), more)


if __name__ == "__main__":
    # On one CPU, TBB would wait forever at exit for threads that DataLoader's forks lost.
    run_and_exit(main)
