"""From the file to batches: this project's way, torchvision's and FFCV's own."""

from __future__ import annotations

import os
import subprocess
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
from cifar_dist.benchmarks.measure import Row, Table, Work, in_turn
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment, beton, dataset
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Order
from cifar_dist.distributed import keep_freed_memory

READ, AUGMENTED = "this project, uint8", "this project, augmented"
FFCV, TORCHVISION = "FFCV's own augmentation", "torchvision v2 + DataLoader"
# Crop and flip as in torchvision's pipeline; FFCV's has cutout as well, and so has this project's unless told.
LIKE_TORCHVISION = AugmentConfig(flip="random", translate=4, cutout=0)


def measure(config: BenchConfig) -> list[Table]:
    """One core, then all of them.

    Raises:
        DataError: there is no sound train.beton in `config.data.dir`.
    """
    path = config.data.dir / dataset.TRAIN
    beton.read_arrays(path)  # checks the file, which FFCV would not
    keep_freed_memory()  # as in training
    cpus = sorted(os.sched_getaffinity(0))
    tables = [_one_core(config, path, cpus[-1])]
    os.sched_setaffinity(0, cpus)
    if len(cpus) > 1:
        tables += [_several_workers(config, path, min(len(cpus), 8)), _two_ranks(config, cpus)]
    return [*tables, _memory(config)]


def _one_core(config: BenchConfig, path: Path, cpu: int) -> Table:
    os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    images, labels = beton.read_arrays(path)
    with ExitStack() as stack:
        started = time.perf_counter()
        loader = stack.enter_context(BetonLoader(path, torch.device("cpu")))
        mine = batches(loader, config.batch_size)
        stack.callback(mine.close)
        next(mine)
        first = f"first batch after {time.perf_counter() - started:.1f} s"
        started = time.perf_counter()
        own = baselines.ffcv_batches(path, config.batch_size)
        stack.callback(own.close)
        next(own)
        first += f"; of FFCV's own pipeline after {time.perf_counter() - started:.1f} s"
        theirs = baselines.torchvision_batches(images, labels, config.batch_size, num_workers=0)
        cases = {
            READ: lambda: float(len(next(mine)[1].labels)),
            AUGMENTED: lambda: _augmented(next(mine), LIKE_TORCHVISION),
            AUGMENTED + ", cutout": lambda: _augmented(next(mine), AugmentConfig()),
            FFCV: lambda: float(len(next(own)[1])),
            TORCHVISION: lambda: float(len(next(theirs)[1])),
        }
        rows = in_turn(cases, config.repeats, config.seconds)
    what = "float32 and normalised but for uint8; crop or translation by 4 and flip; FFCV's as in its example"
    return Table(f"one core, batches of {config.batch_size}", "images/s", rows, TORCHVISION, notes=[first, what])


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


def _augmented(item: tuple[int, Batch], config: AugmentConfig) -> float:
    epoch, batch = item
    draws = augment.draw(batch.indices, seed=0, epoch=epoch, config=config)
    return float(len(augment.apply(batch.images, draws, config.cutout, torch.float32)))


def _several_workers(config: BenchConfig, path: Path, num: int) -> Table:
    """One process that may use all cores, with one and with `num` reading threads or worker processes."""
    torch.set_num_threads(num)
    images, labels = beton.read_arrays(path)
    cases, ahead = dict[str, Work](), dict[str, int]()
    with ExitStack() as stack:
        for workers in (1, num):
            loader = stack.enter_context(BetonLoader(path, torch.device("cpu"), num_workers=workers))
            mine = batches(loader, config.batch_size)
            stack.callback(mine.close)
            theirs = baselines.torchvision_batches(images, labels, config.batch_size, num_workers=workers)
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            cases[f"{READ}, {name}"] = partial(_taken, mine)
            if workers == num:
                cases[f"{AUGMENTED}, {name}"] = partial(_taken, mine, LIKE_TORCHVISION)
            cases[f"{TORCHVISION}, {name}"] = partial(_given, theirs)
            ahead[f"{TORCHVISION}, {name}"] = 2 * workers
            next(theirs)  # starts the worker processes

        def before(name: str) -> None:
            for _ in range(ahead.get(name, 0)):  # what DataLoader's workers did while others were measured
                cases[name]()
            if name not in ahead:
                time.sleep(0.3)  # they fill their queues first

        rows = in_turn(cases, config.repeats, config.seconds, before=before)
    notes = ["busy cores are those of the process itself, without DataLoader's workers"]
    return Table("one process on all cores", "images/s", rows, f"{TORCHVISION}, {name}", notes=notes)


def _taken(mine: Generator[tuple[int, Batch]], config: AugmentConfig | None = None) -> float:
    item = next(mine)
    return float(len(item[1].labels)) if config is None else _augmented(item, config)


def _given(theirs: Iterator[tuple[Tensor, Tensor]]) -> float:
    return float(len(next(theirs)[1]))


_MEMORY = """
import sys
from pathlib import Path
from cifar_dist.benchmarks import loader
print(loader.memory_of(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
"""


def _memory(config: BenchConfig) -> Table:
    """Each in a fresh process."""
    rows = []
    for name in (AUGMENTED, TORCHVISION, f"{TORCHVISION}, 2 workers"):
        command = [sys.executable, "-c", _MEMORY, name, str(config.data.dir / dataset.TRAIN), str(config.batch_size)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(Row(name, [float(result.stdout)]))
    notes = ["pages written to, after the imports, at the highest of a second; with worker processes; files apart"]
    return Table(f"memory, batches of {config.batch_size}", "MB", rows, TORCHVISION, lower_is_better=True, notes=notes)


def memory_of(name: str, path: Path, batch_size: int) -> float:
    """MB that reading by the way `name` adds to what this process and its children have written to."""
    process = psutil.Process()

    def written() -> float:
        return sum(_dirty_bytes(one.pid) for one in [process, *process.children()]) / 1e6

    keep_freed_memory()
    before, work = written(), list[Work]()
    with ExitStack() as stack:
        if name == AUGMENTED:
            mine = batches(stack.enter_context(BetonLoader(path, torch.device("cpu"))), batch_size)
            stack.callback(mine.close)
            work.append(partial(_taken, mine, LIKE_TORCHVISION))
        else:
            images, labels = beton.read_arrays(path)
            workers = 2 if name.endswith("2 workers") else 0
            work.append(partial(_given, baselines.torchvision_batches(images, labels, batch_size, workers)))
        deadline, highest = time.perf_counter() + 1, before
        while time.perf_counter() < deadline:
            for _ in range(5):
                work[0]()
            highest = max(highest, written())
    return highest - before


def _dirty_bytes(pid: int) -> int:
    """Of the pages that several processes share, each counts its part, where the kernel tells."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith(" kB")}
    return 1024 * sizes.get("Pss_Dirty", sizes.get("Private_Dirty", 0))


_RANK = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from pathlib import Path
from cifar_dist.benchmarks import loader
loader.read_as_rank(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
"""


def _two_ranks(config: BenchConfig, cpus: list[int]) -> Table:
    """One and two processes on a core each, by turns: do they get in each other's way?"""
    path, values = config.data.dir / dataset.TRAIN, dict[str, list[float]]()
    arguments = [str(path), str(config.batch_size), str(config.seconds)]
    command = [sys.executable, "-c", _RANK]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(cpu), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for cpu in cpus[:2]
        ]
        for rank in ranks:
            _answer(rank)  # ready
        for _ in range(config.repeats):
            for together in (ranks[:1], ranks):
                for rank in together:
                    _ask(rank, "go")
                name = f"{len(together)} process" + ("es, all of them" if len(together) > 1 else "")
                values.setdefault(name, []).append(sum(float(_answer(rank)) for rank in together))
        for rank in ranks:
            _ask(rank, "end")
    rows = [Row(name, rates) for name, rates in values.items()]
    return Table("processes on a core each, augmented", "images/s", rows, rows[0].name)


def _ask(rank: subprocess.Popen[str], what: str) -> None:
    assert rank.stdin is not None
    rank.stdin.write(what + "\n")
    rank.stdin.flush()


def _answer(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    answer = rank.stdout.readline()
    if not answer:
        raise RuntimeError(f"a measuring process ended with {rank.wait()}")
    return answer


def read_as_rank(path: Path, batch_size: int, seconds: float) -> None:
    """Read and augment for `seconds` at each line of stdin, and answer with images/s."""
    keep_freed_memory()
    torch.set_num_threads(1)
    with BetonLoader(path, torch.device("cpu")) as loader:
        mine = batches(loader, batch_size)
        for _ in range(20):
            _augmented(next(mine), LIKE_TORCHVISION)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() != "go":
                break
            start, done = time.perf_counter(), 0.0
            while (elapsed := time.perf_counter() - start) < seconds:
                done += _augmented(next(mine), LIKE_TORCHVISION)
            print(done / elapsed, flush=True)
        mine.close()
