"""Interleaved timing of cases, the tables that result, and the limits of the device."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.errors import UserError

Work = Callable[[], float]
"""Does some work and returns its amount in the unit of the table (images, GB, TFLOP)."""


@dataclass(frozen=True)
class Row:
    """One case.

    Args:
        values: one per measurement, in the unit of the table.
        busy: CPU seconds of this process per second, one per measurement.
        more: further columns.
    """

    name: str
    values: list[float]
    busy: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Table:
    """Rows that were measured in one process, interleaved.

    Args:
        reference: name of the row to which ratios of medians are computed; empty: no ratios.
        lower_is_better: as for seconds. Ratios are inverted, so a higher ratio is always better.
    """

    title: str
    unit: str
    rows: list[Row]
    reference: str = ""
    lower_is_better: bool = False
    notes: list[str] = field(default_factory=list)

    def ratio(self, row: Row) -> float | None:
        reference = next((r for r in self.rows if r.name == self.reference), None)
        if reference is None or not row.median or not reference.median:
            return None
        ratio = row.median / reference.median
        return 1 / ratio if self.lower_is_better else ratio

    def to_json(self) -> dict[str, Any]:
        """JSON types, with medians and ratios."""
        rows = [
            {"name": r.name, "values": r.values, "median": r.median, "ratio": self.ratio(r), "busy": r.busy, **r.more}
            for r in self.rows
        ]
        return {**vars(self), "rows": rows}


def interleaved(
    cases: Mapping[str, Work],
    repeats: int,
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    before: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure the rate of each case `repeats` times, as A B A B, so that a slow phase of the machine affects all cases.

    Args:
        seconds: minimum length of a measurement, approximately; the case is called as often as that takes.
        wait: waits for the device; called before the clock is read.
        before: called with the name of the case before each measurement, not timed.
    """
    counts = {}
    for name, work in cases.items():
        for _ in range(3):  # compiles, and fills caches
            work()
        wait()
        counts[name] = calls_in(seconds, work, wait)
    rows = {name: Row(name, []) for name in cases}
    for _ in range(repeats):
        for name, work in cases.items():
            before(name)
            start, cpu_start = time.perf_counter(), time.process_time()
            amount = sum(work() for _ in range(counts[name]))
            wait()
            cpu_seconds, elapsed = time.process_time() - cpu_start, time.perf_counter() - start
            rows[name].values.append(amount / elapsed)
            rows[name].busy.append(cpu_seconds / elapsed)
    return list(rows.values())


def calls_in(seconds: float, work: Work, wait: Callable[[], None]) -> int:
    """Number of calls of `work` that take `seconds`.

    Extrapolated from calls that take a fifth of it, because the first ones may be served from a prefetch queue.
    """
    num = 1
    while True:
        start = time.perf_counter()
        for _ in range(num):
            work()
        wait()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 5:
            return max(1, math.ceil(seconds * num / elapsed))
        num *= 2


def processes(num: int) -> str:
    return f"{num} process{'es' if num > 1 else ''}"


def threads(device: torch.device) -> str:
    """For titles: the number of threads on a CPU, nothing on a GPU."""
    return "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"


def failure(error: Exception) -> str:
    """One line on why a case could not be measured."""
    return f"not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def has_gpu(config: BenchConfig) -> bool:
    """Whether the device to measure is a GPU.

    Raises:
        UserError: a GPU is required and missing.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here. Check nvidia-smi, or use --device cpu.")
    return config.device != "cpu" and torch.cuda.is_available()


def num_devices(on_gpu: bool) -> int:
    """GPUs of this machine, or its processors, at most eight."""
    return torch.cuda.device_count() if on_gpu else min(len(os.sched_getaffinity(0)), 8)


def wait_for(device: torch.device) -> Callable[[], None]:
    """A function that waits until `device` has finished its work."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


@dataclass(frozen=True)
class Limits:
    """The highest measured rates of the device: flop/s of a matrix product, bytes/s of a copy."""

    flops: float
    bytes: float


def measure_limits(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> tuple[Limits, list[Table]]:
    """Measure a product of square matrices in `dtype`, and a copy that is much larger than any cache."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, device=device, dtype=torch.uint8)
    product, target = torch.empty_like(a), torch.empty_like(source)

    def multiply() -> float:
        torch.mm(a, b, out=product)
        return 2 * side**3 / 1e12

    def copy() -> float:
        target.copy_(source)
        return 2 * size / 1e9

    tables = []
    for title, unit, name, work in (
        (f"products of {side} x {side}, {str(dtype).removeprefix('torch.')}", "TFLOP/s", "matrix product", multiply),
        (f"copy of {size / 2**20:.0f} MiB", "GB/s", "copy, read and written", copy),
    ):
        rows = interleaved({name: work}, config.repeats, min(config.seconds, 0.5), wait_for(device))
        tables.append(Table(f"limits of the device: {title}", unit, rows))
    flops, traffic = (max(table.rows[0].values) for table in tables)
    return Limits(flops * 1e12, traffic * 1e9), tables


@dataclass(frozen=True)
class Cost:
    """Of one step: flop of products and convolutions, bytes that operations read and write, number of operations."""

    flops: int
    bytes: int
    num_operations: int


def cost_of(step: Callable[[], object]) -> Cost:
    """Count while the uncompiled `step` runs, twice."""
    with FlopCounterMode(display=False) as counter:
        step()
    with _Traffic() as traffic:
        step()
    return Cost(counter.get_total_flops(), traffic.bytes, traffic.num_operations)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the bytes of the tensors that they read and write. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            self.num_operations += 1
            tensors = {id(t): t for t in tree_leaves([args, kwargs, output]) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return output
