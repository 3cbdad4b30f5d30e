"""Results of the benchmark as text and JSON, and the comparison of two of them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from cifar_dist.cli import aligned, command_line
from cifar_dist.environment import num_processors
from cifar_dist.errors import UserError
from cifar_dist.files import read_json
from cifar_dist.training import summary

FORMAT = "cifar_dist bench, format 2"
Report = dict[str, Any]
"""Header, and "parts": {name: {"seconds", "tables": [Table.to_json()]}}, with "failure" for a part that failed."""


def header() -> Report:
    """Command, date, hardware and versions."""
    devices, versions = [summary.device_name(torch.device("cpu"))], summary.versions()
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] + devices
        cudnn: Any = torch.backends.cudnn
        nccl: Any = torch.cuda.nccl
        versions |= {"cudnn": str(cudnn.version()), "nccl": ".".join(map(str, nccl.version()))}
    return {
        "format": FORMAT,
        "command": command_line(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": summary.git_commit(),
        "hardware": ", ".join(devices),
        "num_cpus": num_processors(),
        "versions": versions,
    }


def text(report: Report) -> str:
    """The report for people, one line per row."""
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
            title = f"{table['title']} [{table['unit']}]"
            ratios = any(row["ratio"] for row in table["rows"])
            lines += ["", f"{title}; ratio to: {table['reference']}" if ratios else title]
            lines += [*_table([_cells(row) for row in table["rows"]]), *(f"  {note}" for note in table["notes"])]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Cells of a row of a table by column."""
    values, cells = row["values"], {"": row["name"], "median": number(row["median"])}
    cells["min..max"] = f"{number(min(values))}..{number(max(values))}" if len(values) > 1 else ""
    if row["ratio"]:
        cells["ratio"] = f"{row['ratio']:.2f}"
    return cells | {key: number(row[key]) for key in row if key not in ("name", "values", "median", "ratio")}


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A heading and the lines of a table, from the cells of each row by column."""
    columns = list(dict.fromkeys(["", *(key for row in rows for key in row)]))
    cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    return [f"  {line}" for line in aligned(cells, gap="  ")]


def number(value: float) -> str:
    """Three digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def read(path: Path) -> Report:
    """Read a file written with --json.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    tree = read_json(path)
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        if tree["format"] == FORMAT:
            compare(tree, tree)
            return tree
    raise UserError(f"{path} is missing or damaged, or was not written by bench --json (its format is {FORMAT!r}).")


def compare(old: Report, new: Report) -> str:
    """Changes of the medians. A row is marked as faster or slower if its old and new values do not overlap."""
    lines = [f"old: {old['date']}, {old['hardware']}", f"new: {new['date']}, {new['hardware']}"]
    if old["hardware"] != new["hardware"]:
        lines.append("The hardware differs: compare the ratios, not the rates.")
    before, after = _rows(old), _rows(new)
    changes = [_change(key, before[key], after[key]) for key in before if key in after and before[key]["median"]]
    num_marked = sum(bool(cells["mark"]) for cells in changes)
    lines += ["", *_table(changes), "", f"{num_marked} of {len(changes)} rows changed by more than their spread."]
    lines += [f"In one file only: {key}" for key in {**before, **after} if (key in before) != (key in after)]
    return "\n".join(lines)


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    change = new["median"] / old["median"] - 1
    apart = min(new["values"]) > max(old["values"]) or max(new["values"]) < min(old["values"])
    apart = apart and min(len(old["values"]), len(new["values"])) > 1  # a single value has no spread
    cells = {"": key, "old": number(old["median"]), "new": number(new["median"]), "change": f"{change:+.1%}"}
    for column, row in (("old ratio", old), ("new ratio", new)):
        cells[column] = f"{row['ratio']:.2f}" if row["ratio"] else ""
    return cells | {"mark": ("faster" if change > 0 else "slower") if apart else ""}


def _rows(report: Report) -> dict[str, dict[str, Any]]:
    """Rows by part, title and name."""
    return {
        f"{part} / {table['title']} / {row['name']}": row
        for part, content in report["parts"].items()
        for table in content["tables"]
        for row in table["rows"]
    }
