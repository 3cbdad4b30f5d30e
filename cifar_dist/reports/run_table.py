"""All runs below a folder, as a table, CSV or JSON lines. Does not import torch, so that a table appears at once."""

import csv
import io
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cifar_dist.cli import aligned
from cifar_dist.errors import UserError, explain_os_error, one_line
from cifar_dist.reports.run_state import RunFiles, RunState, read_files, read_states

MAX_DEPTH = 4  # levels of folders; launch/sweep makes runs three levels below runs/
MAX_WIDTH = 100  # of a line of the table, unless a name is long

Column = Literal["name", "state", "step", "accuracy", "n", "images_per_second", "seconds", "devices", "changed"]
_TITLES: dict[str, str] = {"images_per_second": "images/s", "seconds": "time"}


@dataclass(frozen=True)
class RunList:
    """`others`: folders directly below `folder` that hold no run of this project, and files do not count."""

    folder: Path
    runs: Sequence[RunState]
    others: Sequence[str]

    def name(self, run: RunState) -> str:
        """The path of a run relative to the folder, on one line."""
        relative = run.directory.relative_to(self.folder)
        return printable(str(relative) if relative.parts else self.folder.resolve().name)


def read(folder: Path) -> RunList:
    """The runs in `folder` and up to MAX_DEPTH levels below it; `folder` itself may be one.

    Folders inside a run and hidden ones are left out. Each folder counts once, whatever links lead to it.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    with explain_os_error(f"{folder} cannot be read", "Give a folder of runs, such as runs."):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder. Give a folder of runs, such as runs, or a run directory.")
        os.scandir(folder).close()
    todo, seen = deque([(folder, 0)]), set[tuple[int, int]]()
    runs, unreadable, tops, with_runs = list[RunFiles](), list[RunState](), list[str](), set[str]()
    own = set[tuple[int, int]]()
    while todo:
        directory, depth = todo.popleft()
        top = directory.relative_to(folder).parts[:1]
        if depth == 1:
            tops.append(top[0])
        try:
            found = directory.stat()
            place = found.st_dev, found.st_ino
            if place in seen:
                with_runs.update(top if depth == 1 or place in own else ())  # listed under another name
                continue
            seen.add(place)
            files = read_files(directory)
            if files is None and depth < MAX_DEPTH:
                folders = sorted(path for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
                todo += [(path, depth + 1) for path in folders]
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError as error:
            unreadable.append(RunState(directory, "unreadable", error.strerror or one_line(error)))
            with_runs.update(top)
            continue
        if files is not None:
            own.add(place)
            runs.append(files)
            with_runs.update(top)
    states = [*read_states(runs), *unreadable]
    return RunList(folder, states, [name for name in tops if name not in with_runs])


def sort(found: RunList, column: Column, descending: bool) -> RunList:
    """The runs in the order of a column, then of their names; those without a value last."""

    def value(run: RunState) -> Any:
        return found.name(run) if column == "name" else getattr(run, column)

    def known(run: RunState) -> bool:
        return value(run) is not None and value(run) == value(run)  # NaN differs from itself

    by_name = sorted(found.runs, key=found.name)
    ordered = sorted(filter(known, by_name), key=value, reverse=descending)
    return RunList(found.folder, [*ordered, *(run for run in by_name if not known(run))], found.others)


def table(found: RunList) -> str:
    """A line per run, then a line for each that has a note, then which folders are left out."""
    rows = [[_TITLES.get(name, name) for name in Column.__args__]]  # type: ignore[attr-defined]
    rows += [[found.name(run), run.state, *_cells(run)] for run in found.runs]
    lines = aligned(rows, "  ") if found.runs else [f"no runs in {printable(str(found.folder))}"]
    notes = [f"{found.name(run)}: {printable(run.note)}" for run in found.runs if run.note]
    lines += ["", *(_cut(note) for note in notes)] if notes else []
    if found.others:
        names = ", ".join(map(printable, found.others))
        num = len(found.others)
        lines += ["", _cut(f"{num} other folder{'s' if num > 1 else ''} without a run of this project: {names}")]
    return "\n".join(lines)


def records(found: RunList) -> list[dict[str, Any]]:
    """Of each run all that is known, in the types of JSON; `changed` in ISO 8601, NaN as text."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    lines = []
    for run in found.runs:
        values = {name: plain(value) for name, value in vars(run).items() if name != "directory"}
        changed = None if run.changed is None else _time(run.changed).isoformat(timespec="seconds")
        lines.append({"name": found.name(run), **values, "changed": changed})
    return lines


def as_text(found: RunList, form: Literal["table", "csv", "jsonl"]) -> str:
    """The list in one of the formats."""
    if form == "table":
        return table(found)
    lines = records(found)
    if form == "jsonl":
        return "\n".join(json.dumps(line, allow_nan=False) for line in lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", *list(RunState.__dataclass_fields__)[1:]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().removesuffix("\n")


def printable(text: str) -> str:
    """`text` on one line: line breaks, control characters and bytes that are no UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Such as 0:03:54."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _cells(run: RunState) -> list[str]:
    step = "-" if run.step is None else str(run.step)
    year = run.changed and _time(run.changed).year == datetime.now().year
    return [
        f"{step}/{run.total_steps}" if run.total_steps is not None else step,
        "-" if run.accuracy is None else f"{run.accuracy_of} {100 * run.accuracy:.2f}%",
        "-" if run.n is None else f"{run.n:,}",
        "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
        duration(run.seconds) if run.seconds is not None and math.isfinite(run.seconds) else "-",
        "-" if run.devices is None else str(run.devices),
        f"{_time(run.changed):{'%m-%d %H:%M' if year else '%Y-%m-%d'}}" if run.changed is not None else "-",
    ]


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()


def _cut(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}..."
