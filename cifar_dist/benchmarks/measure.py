"""Interleaved timing of cases, and the tables that result."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import TrainConfig
from cifar_dist.distributed import World, init_distributed
from cifar_dist.training.precision import Precision, choose_precision, set_backends

Case = tuple[float, Callable[[], object]]
"""The amount of work of a call, in the unit of the table (images, GB, TFLOP), and what to call."""


@dataclass(frozen=True)
class Row:
    """One case, with a value per measurement in the unit of the table."""

    name: str
    values: list[float]
    more: dict[str, float] = field(default_factory=dict)  # further columns

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Table:
    """Rows that were measured interleaved, and the ratios of their medians to a reference. A higher rate is better."""

    title: str
    unit: str
    rows: list[Row]
    reference: str = ""  # name of a row; empty: no ratios
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON types, with medians and ratios."""
        reference = next((row.median for row in self.rows if row.name == self.reference), None)

        def cells(row: Row) -> dict[str, Any]:
            ratio = row.median / reference if reference else None
            return {"name": row.name, "values": row.values, "median": row.median, "ratio": ratio, **row.more}

        return {**vars(self), "rows": [cells(row) for row in self.rows]}


@contextmanager
def torch_as_in_training(config: BenchConfig) -> Iterator[tuple[World, Precision]]:
    """Join the process group, and set torch's switches as a training does; on CPUs processes share all processors."""
    with init_distributed(config.device) as world:
        set_backends(TrainConfig(), False, world.device)
        yield world, choose_precision(config.precision, world.device)


def now() -> float:
    """Wait for the GPU of this process and for all ranks of the job, and read rank 0's clock, in seconds.

    Because they share a clock, all ranks choose the same numbers of calls.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    if not dist.is_initialized():
        return time.perf_counter()
    dist.barrier()
    shared = torch.tensor(time.perf_counter(), dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def seconds_of(num: int, work: Callable[[], object]) -> float:
    """Seconds of `num` calls of `work`."""
    start = now()
    for _ in range(num):
        work()
    return now() - start


def calls_in(seconds: float, work: Callable[[], object]) -> int:
    """Number of calls of `work` that take `seconds`.

    Extrapolated from calls that take a fifth of it, because the first ones may be served from a prefetch queue.
    """
    num = 1
    while (elapsed := seconds_of(num, work)) < seconds / 5:
        num *= 2
    return max(1, math.ceil(seconds * num / elapsed))


def interleaved(
    cases: Mapping[str, Case],
    config: BenchConfig,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> list[Row]:
    """Measure the rate of each case `config.repeats` times, for about `config.seconds`.

    In turn, as A B A B, so that a slow phase of the machine affects all cases.

    Args:
        around: given the name of a case, a context for each of its measurements; entering and leaving are not timed.
    """
    counts = dict[str, int]()
    for name, (_, work) in cases.items():
        with around(name):
            for _ in range(3):  # compiles, and fills caches
                work()
            counts[name] = calls_in(config.seconds, work)
    rows = [Row(name, []) for name in cases]
    for _ in range(config.repeats):
        for row in rows:
            amount, work = cases[row.name]
            with around(row.name):
                row.values.append(amount * counts[row.name] / seconds_of(counts[row.name], work))
    return rows
