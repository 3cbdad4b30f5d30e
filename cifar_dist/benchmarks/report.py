"""Results of the benchmark as text and JSON, and the comparison of two of them."""

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

import torch

from cifar_dist.errors import UserError
from cifar_dist.training import summary

FORMAT = "cifar_dist bench, format 1"
Report = dict[str, Any]
"""Header, and "parts": {name: {"seconds", "tables": [Table.to_json()]}}, with "failure" for a part that failed."""


def header() -> Report:
    """Command, date, hardware and versions."""
    devices, versions = [summary.device_name(torch.device("cpu"))], summary.versions()
    if torch.cuda.is_available():
        cudnn: Any = torch.backends.cudnn
        nccl: Any = torch.cuda.nccl
        devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] + devices
        versions |= {"cudnn": str(cudnn.version()), "nccl": ".".join(map(str, nccl.version()))}
    return {
        "format": FORMAT,
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": summary.git_commit(),
        "hardware": ", ".join(devices),
        "num_cpus": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def text(report: Report) -> str:
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


def last_lines(output: str) -> str:
    """The end of a process's output, for an error message."""
    return "\n".join(output.strip().splitlines()[-15:])


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    rows = table["rows"]
    ratios, busy = any(row["ratio"] for row in rows), any(row["busy"] for row in rows)
    own = ("name", "values", "median", "ratio", "busy")
    more = list(dict.fromkeys(key for row in rows for key in row if key not in own))
    cells = [["", "median", "min..max", *["ratio"] * ratios, *["busy cores"] * busy, *more]]
    for row in rows:
        values = row["values"]
        line = [row["name"], number(row["median"])]
        line.append(f"{number(min(values))}..{number(max(values))}" if len(values) > 1 else "")
        if ratios:
            line.append(f"{row['ratio']:.2f}" if row["ratio"] else "")
        if busy:
            line.append(f"{statistics.median(row['busy']):.2f}" if row["busy"] else "")
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
    """At least three digits, and all digits before the decimal point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def read(path: Path) -> Report:
    """Read a file written with --json.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Give a file written by bench --json.") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{path} was not written by bench --json (its `format` must be {FORMAT!r}).")
    try:
        compare(tree, tree)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}.") from None
    return tree


def compare(old: Report, new: Report) -> str:
    """Changes of the medians. A row is marked as faster or slower if its old and new values do not overlap."""
    lines = [f"old: {old['date']}, {old['hardware']}", f"new: {new['date']}, {new['hardware']}"]
    if old["hardware"] != new["hardware"]:
        lines.append("The hardware differs: compare the ratios, not the rates.")
    before, after = _rows(old), _rows(new)
    cells, num_marked = [["", "old", "new", "change", "old ratio", "new ratio", ""]], 0
    for key in [key for key in before if key in after and before[key]["median"]]:
        then, now = before[key], after[key]
        change = now["median"] / then["median"] - 1
        apart = min(now["values"]) > max(then["values"]) or max(now["values"]) < min(then["values"])
        apart = apart and min(len(then["values"]), len(now["values"])) > 1  # a single value has no spread
        mark = ("slower" if (change < 0) != then["lower_is_better"] else "faster") if apart else ""
        num_marked += apart
        ratios = [f"{row['ratio']:.2f}" if row["ratio"] else "" for row in (then, now)]
        cells.append([" / ".join(key), number(then["median"]), number(now["median"]), f"{change:+.1%}", *ratios, mark])
    lines += ["", *_aligned(cells), "", f"{num_marked} of {len(cells) - 1} rows changed by more than their spread."]
    lines += [
        f"In one file only: {' / '.join(key)}" for key in {**before, **after} if (key in before) != (key in after)
    ]
    return "\n".join(lines)


def _rows(report: Report) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows by part, title and name, with `lower_is_better` of their table."""
    return {
        (part, table["title"], row["name"]): {
            "values": [float(value) for value in row["values"]],
            "median": float(row["median"]),
            "ratio": row.get("ratio"),
            "lower_is_better": bool(table["lower_is_better"]),
        }
        for part, content in report["parts"].items()
        for table in content["tables"]
        for row in table["rows"]
    }
