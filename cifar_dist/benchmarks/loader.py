"""From the file to batches: this project's way, torchvision's and FFCV's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.measure import Row, Table, Work, in_turn, processes
from cifar_dist.benchmarks.reading import AUGMENTED, LIKE_TORCHVISION, TORCHVISION, batches, take, take_theirs
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import AugmentConfig
from cifar_dist.data import beton, dataset
from cifar_dist.data.beton import Images, Labels
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import keep_freed_memory

READ, FFCV = "this project, uint8", "FFCV's own augmentation"


def measure(config: BenchConfig) -> list[Table]:
    """One core, then all of them.

    Raises:
        DataError: there is no sound train.beton in `config.data.dir`.
    """
    path = config.data.dir / dataset.TRAIN
    arrays = beton.read_arrays(path)  # also checks the file, which FFCV would not
    keep_freed_memory()  # as in training
    cpus = sorted(os.sched_getaffinity(0))
    tables = [_one_core(config, path, arrays, cpus[-1])]
    os.sched_setaffinity(0, cpus)
    if len(cpus) > 1:
        tables += [_several_workers(config, path, arrays, min(len(cpus), 8)), _two_ranks(config, path, cpus)]
    return [*tables, _memory(config, path)]


def _one_core(config: BenchConfig, path: Path, arrays: tuple[Images, Labels], cpu: int) -> Table:
    os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
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
        cases: dict[str, Work] = {
            READ: partial(take, mine),
            AUGMENTED: partial(take, mine, LIKE_TORCHVISION),
            AUGMENTED + ", cutout": partial(take, mine, AugmentConfig()),
            FFCV: partial(take_theirs, own),
            TORCHVISION: partial(take_theirs, baselines.torchvision_batches(*arrays, config.batch_size, num_workers=0)),
        }
        rows = in_turn(cases, config.repeats, config.seconds)
    what = "float32 and normalised but for uint8; crop or translation by 4 and flip; FFCV's as in its example"
    return Table(f"one core, batches of {config.batch_size}", "images/s", rows, TORCHVISION, notes=[first, what])


def _several_workers(config: BenchConfig, path: Path, arrays: tuple[Images, Labels], num: int) -> Table:
    """One process that may use all cores, with one and with `num` reading threads or worker processes."""
    torch.set_num_threads(num)
    cases, ahead = dict[str, Work](), dict[str, int]()
    with ExitStack() as stack:
        for workers in (1, num):
            loader = stack.enter_context(BetonLoader(path, torch.device("cpu"), num_workers=workers))
            mine = batches(loader, config.batch_size)
            stack.callback(mine.close)
            theirs = baselines.torchvision_batches(*arrays, config.batch_size, num_workers=workers)
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            cases[f"{READ}, {name}"] = partial(take, mine)
            if workers == num:
                cases[f"{AUGMENTED}, {name}"] = partial(take, mine, LIKE_TORCHVISION)
            cases[f"{TORCHVISION}, {name}"] = partial(take_theirs, theirs)
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


def _two_ranks(config: BenchConfig, path: Path, cpus: list[int]) -> Table:
    """One and two processes on a core each, by turns: do they get in each other's way?"""
    values = dict[str, list[float]]()
    with ExitStack() as stack:
        ranks = []
        for cpu in cpus[:2]:
            os.sched_setaffinity(0, {cpu})  # a process starts on the cores of that which starts it
            command = _command("rate", path, config, str(config.seconds))
            started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ranks.append(stack.enter_context(started))
        os.sched_setaffinity(0, cpus)
        for rank in ranks:
            _answer(rank)  # ready
        for _ in range(config.repeats):
            for together in (ranks[:1], ranks):
                for rank in together:
                    _ask(rank, "go")
                name = processes(len(together)) + (", all of them" if len(together) > 1 else "")
                values.setdefault(name, []).append(sum(float(_answer(rank)) for rank in together))
        for rank in ranks:
            _ask(rank, "end")
    rows = [Row(name, rates) for name, rates in values.items()]
    return Table("processes on a core each, augmented", "images/s", rows, rows[0].name)


def _memory(config: BenchConfig, path: Path) -> Table:
    """Each in a fresh process."""
    rows = []
    for name in (AUGMENTED, TORCHVISION, f"{TORCHVISION}, 2 workers"):
        result = subprocess.run(_command("memory", path, config, name), stdout=subprocess.PIPE, text=True, check=True)
        rows.append(Row(name, [float(result.stdout)]))
    notes = ["pages written to, after the imports, at the highest of a second; with worker processes; files apart"]
    return Table(f"memory, batches of {config.batch_size}", "MB", rows, TORCHVISION, lower_is_better=True, notes=notes)


def _command(what: str, path: Path, config: BenchConfig, more: str) -> list[str]:
    return [sys.executable, "-m", "cifar_dist.benchmarks.reading", what, str(path), str(config.batch_size), more]


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
