"""The figures of several runs side by side, one column each."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_dist.cli import aligned, display_width
from cifar_dist.reports.intervals import wilson
from cifar_dist.reports.run_state import RunFiles, RunState, read_files, read_states
from cifar_dist.reports.run_table import duration, printable
from cifar_dist.tracking.metrics_file import number

MAX_WIDTH = 100
_MAX_CELL = 30
Values = Mapping[str, Any]  # summary.json over the last values in metrics.jsonl


def names(runs: Sequence[Path]) -> list[str]:
    """The paths without what all begin with."""
    resolved = [run.resolve() for run in runs]
    parent = Path(os.path.commonpath(resolved))
    short = [printable(str(path.relative_to(parent))) for path in resolved]
    return [printable(str(run)) for run in runs] if "." in short else short


def figures(runs: Sequence[Path]) -> str:
    """A row per figure that a run has, a column per run; several tables if they would be wider than MAX_WIDTH."""
    files = [read_files(run) or RunFiles(run, {}, {}, {}, [], {}, False, None) for run in runs]
    columns = []
    for name, found, state in zip(names(runs), files, read_states(files), strict=True):
        last = {key: value for record in found.records for key, value in record.items() if value is not None}
        values = {**last, **found.summary}
        columns.append([_short(name), *(_cell(cell, values, state) for cell in _ROWS.values())])
    rows = list(zip(["", *_ROWS], *columns, strict=True))
    rows = [rows[0], *(row for row in rows[1:] if set(row[1:]) != {"-"})]
    return "\n\n".join(_tables(rows))


def _tables(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The first column with the next ones, as many as fit but at least one, then with those after them."""
    first, end = 1, len(rows[0])
    while first < end:
        for last in range(end, first, -1):
            lines = aligned([row[:1] + row[first:last] for row in rows])
            if max(map(display_width, lines)) <= MAX_WIDTH or last == first + 1:
                yield "\n".join(lines)
                first = last
                break


def _cell(cell: Callable[[Values, RunState], str], values: Values, state: RunState) -> str:
    try:
        return _short(printable(cell(values, state)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError):  # unknown, or damaged
        return "-"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CELL else f"...{text[3 - _MAX_CELL :]}"


def _real(value: Any) -> float:
    found = number(value)
    if found is None:
        raise ValueError
    return found


def _percent(value: Any, n: Any) -> str:
    return f"{100 * _real(value):.2f} %, n = {n:,}"


def _interval(accuracy: float, n: int) -> str:
    return "{:.2f} to {:.2f} %".format(*(100 * end for end in wilson(accuracy, n)))


def _processes(values: Values, state: RunState) -> str:
    nodes = values.get("num_nodes", 1)
    return f"{state.devices:,}" + (f" on {nodes} nodes" if nodes > 1 else "")


_ROWS: Mapping[str, Callable[[Values, RunState], str]] = {
    "state": lambda _, s: s.state,
    "steps": lambda _, s: f"{s.step:,}" + (f" of {s.total_steps:,}" if s.total_steps is not None else ""),
    "epochs": lambda v, _: f"{v.get('epochs', v.get('epoch')):.4g}",
    "test accuracy": lambda v, _: _percent(v["test_accuracy"], v["test_n"]),
    "  95 % interval": lambda v, _: _interval(v["test_accuracy"], v["test_n"]),
    "  with TTA": lambda v, _: _percent(v["test_accuracy_tta"], v["test_n"]),
    "validation accuracy": lambda v, _: _percent(
        v.get("val_accuracy", v.get("val/accuracy")), v.get("val_n", v.get("val/n"))
    ),
    "test loss": lambda v, _: f"{_real(v['test_loss']):.4f}",
    "validation loss": lambda v, _: f"{_real(v['val/loss']):.4f}",
    "training loss": lambda v, _: f"{_real(v['train/loss']):.4f}",
    "training time": lambda _, s: duration(_real(s.seconds)),
    "images/s": lambda _, s: f"{_real(s.images_per_second):,.0f}",
    "parameters": lambda v, _: f"{v['params']:,}",
    "batch": lambda v, _: f"{v['batch_size']:,} in parts of {v['micro_batch_size']:,}",
    "precision": lambda v, _: str(v["precision"]),
    "processes": _processes,
    "devices": lambda v, _: ", ".join(dict.fromkeys(v["device_names"])),
}
