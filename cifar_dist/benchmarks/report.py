"""Reports of measurements: one header, tables of rows; as text, as JSON, and two of them held against each other."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError

FORMAT = "cifar_dist bench, format 1"
Report = dict[str, Any]  # header, and "parts": {part: {"seconds", "tables": [Table.plain()]}}
_OWN_COLUMNS = ("name", "values", "median", "ratio", "busy")


def header() -> Report:
    """What was measured where: command, date, hardware, versions."""
    import torch

    from cifar_dist.distributed import World
    from cifar_dist.training import summary

    names = [summary.device_names(World(0, 1, 0, 1, torch.device("cpu")))[0]]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] + names
    return {
        "format": FORMAT,
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": summary.git_commit(),
        "hardware": ", ".join(names),
        "num_cpus": len(os.sched_getaffinity(0)),
        "versions": summary.versions() | _versions_on_gpu(),
    }


def _versions_on_gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    cudnn: Any = torch.backends.cudnn
    nccl: Any = torch.cuda.nccl
    return {"cudnn": str(cudnn.version()), "nccl": ".".join(map(str, nccl.version()))}


def text(report: Report) -> str:
    """The report as a person reads it."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        report["command"],
        f"{report['date']}, commit {report['git_commit'] or 'unknown'}",
        f"{report['hardware']}, {report['num_cpus']} processors; {versions}",
    ]
    for part, content in report["parts"].items():
        lines += ["", f"== {part} ({content['seconds']:.0f} s)"]
        if "failure" in content:
            lines += ["", f"FAILED: {content['failure']}"]
        for table in content["tables"]:
            lines += ["", *_table(table)]
    return "\n".join(lines)


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    more = list(dict.fromkeys(key for row in table["rows"] for key in row if key not in _OWN_COLUMNS))
    ratios, busy = any(row["ratio"] for row in table["rows"]), any(row["busy"] for row in table["rows"])
    heads = ["", "median", "min..max", *(["ratio"] if ratios else []), *(["busy cores"] if busy else []), *more]
    cells = [heads]
    for row in table["rows"]:
        spread = f"{number(min(row['values']))}..{number(max(row['values']))}" if len(row["values"]) > 1 else ""
        line = [row["name"], number(row["median"]), spread]
        line += [f"{row['ratio']:.2f}" if row["ratio"] else ""] if ratios else []
        line += [f"{statistics.median(row['busy']):.2f}" if row["busy"] else ""] if busy else []
        cells.append(line + [number(row[key]) if key in row else "" for key in more])
    yield f"{table['title']} [{table['unit']}]" + (f"; ratio to: {table['reference']}" if ratios else "")
    yield from _aligned(cells)
    yield from (f"  {note}" for note in table["notes"])


def _aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        line = f"  {first:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))
        yield line.rstrip()


def number(value: float) -> str:
    """With three digits at least, and all before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def read(path: Path) -> Report:
    """A report that --json wrote.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Give a file that bench --json wrote.") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{path} is no report of bench (its `format` must be {FORMAT!r}).")
    try:
        _rows(tree)
        str(tree["date"] + tree["hardware"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}.") from None
    return tree


def compare(old: Report, new: Report) -> str:
    """What became faster or slower: rows of both whose ranges of values do not overlap are marked."""
    lines = [f"old: {old['date']}, {old['hardware']}", f"new: {new['date']}, {new['hardware']}"]
    if old["hardware"] != new["hardware"]:
        lines.append("The hardware differs: compare the ratios, not the rates.")
    before, after = _rows(old), _rows(new)
    cells, marked = [["", "old", "new", "change", "ratio then", "ratio now", ""]], 0
    for key in [key for key in before if key in after]:
        (then, lower), (now, _) = before[key], after[key]
        if not then["median"]:
            continue
        change = now["median"] / then["median"] - 1
        apart = min(now["values"]) > max(then["values"]) or max(now["values"]) < min(then["values"])
        apart = apart and min(len(then["values"]), len(now["values"])) > 1  # a single value has no spread
        mark = ("slower" if (change < 0) != lower else "faster") if apart else ""
        marked += apart
        ratios = [f"{row['ratio']:.2f}" if row.get("ratio") else "" for row in (then, now)]
        cells.append([" / ".join(key), number(then["median"]), number(now["median"]), f"{change:+.1%}", *ratios, mark])
    only = [" / ".join(key) for key in {**before, **after} if (key in before) != (key in after)]
    lines += ["", *_aligned(cells), "", f"{marked} of {len(cells) - 1} rows changed by more than their spread."]
    lines += [f"In one of them only: {name}" for name in only]
    return "\n".join(lines)


def _rows(report: Report) -> dict[tuple[str, str, str], tuple[Mapping[str, Any], bool]]:
    """By part, title and name: the row, and whether less of it is better."""
    found = {}
    for part, content in report["parts"].items():
        for table in content["tables"]:
            for row in table["rows"]:
                if not all(isinstance(value, (int, float)) for value in [row["median"], *row["values"]]):
                    raise ValueError(f"{part}, {table['title']}: {row['name']} has values that are no numbers")
                if not row["values"]:
                    raise ValueError(f"{part}, {table['title']}: {row['name']} has no values")
                found[part, table["title"], row["name"]] = row, bool(table["lower_is_better"])
    return found
