"""Measuring in turn, and the tables that come of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], float]
"""Does a portion of work and returns how much it was, in the table's unit (images, bytes, operations)."""


@dataclass(frozen=True)
class Row:
    """One thing that was measured: `values`, and per value the CPU seconds of this process per second, `busy`; `more`
    are further figures, by column."""

    name: str
    values: list[float]
    busy: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Table:
    """Rows measured in one run, in turn. Ratios are those of the medians, to the row `reference` (empty: none); of
    what has `lower_is_better`, such as seconds, upside down, so that more is better in every ratio."""

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

    def plain(self) -> dict[str, Any]:
        """As JSON values, with medians and ratios."""
        rows = [
            {"name": r.name, "values": r.values, "median": r.median, "ratio": self.ratio(r), "busy": r.busy, **r.more}
            for r in self.rows
        ]
        return {
            "title": self.title, "unit": self.unit, "lower_is_better": self.lower_is_better,
            "reference": self.reference, "rows": rows, "notes": self.notes,
        }  # fmt: skip


def in_turn(
    cases: Mapping[str, Work],
    repeats: int,
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    warm_up: int = 1,
    before: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rates of `cases`, `repeats` times in turn, so that a slow spell of the machine meets them all.

    Args:
        seconds: each measurement repeats its case for at least about as long.
        wait: waits for the device; called around each measurement.
        warm_up: calls of each case before, which do not count.
        before: called with a case's name before each measurement of it, untimed.
    """
    counts = {}
    for name, work in cases.items():
        for _ in range(warm_up):
            work()
        wait()
        counts[name] = calls_in(seconds, work, wait)
    rows = {name: Row(name, []) for name in cases}
    for _ in range(repeats):
        for name, work in cases.items():
            before(name)
            start, cpu_start = time.perf_counter(), time.process_time()
            done = sum(work() for _ in range(counts[name]))
            wait()
            cpu_seconds, elapsed = time.process_time() - cpu_start, time.perf_counter() - start
            rows[name].values.append(done / elapsed)
            rows[name].busy.append(cpu_seconds / elapsed)
    return list(rows.values())


def calls_in(seconds: float, work: Work, wait: Callable[[], None]) -> int:
    """How many calls take `seconds` at least, from as many as take a fifth of that: a first one may find work done."""
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
    """For names of rows and tables."""
    return f"{num} process{'es' if num > 1 else ''}"
