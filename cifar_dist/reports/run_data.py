"""All that a report shows of one run, read from its directory; what is missing or damaged counts as absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.files import read_json
from cifar_dist.reports import run_state
from cifar_dist.reports.intervals import wilson
from cifar_dist.tracking.metrics_file import Record, number, read_records, steps_per_epoch
from cifar_dist.yaml_file import Entry, read_entries

Curve = list[tuple[float, float]]  # steps and values, which may be NaN or infinite
LEFT_OUT_KEYS = ("step", "epoch", "seconds", "val/n", "test/n")  # not drawn as curves of their own


@dataclass(frozen=True)
class RunData:
    """One run of this package, or of another program that W&B recorded."""

    directory: Path
    name: str
    curves: Mapping[str, Curve]
    """By the names of metrics.jsonl or of W&B."""
    settings: Mapping[str, str]
    """By their full names; empty if config.yaml cannot be read."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """The values of summary.json, which a run writes when it is complete; or W&B's summary."""
    state: str = "unknown"
    """As `runs` lists it: done, running, killed, stopped, failed; unknown for all else."""
    status: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """What a reader of the report should know about the files."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What W&B recorded of a run of another program; empty for runs of this package."""
    steps_per_epoch: float | None = None
    x_names: Mapping[str, str] = field(default_factory=dict)
    """What the curves are over, where that is not the step."""

    @property
    def num_steps(self) -> int:
        last = (points[-1][0] for points in self.curves.values() if points)
        return int(max(last, default=self.figure("steps") or 0))

    @property
    def devices(self) -> str:
        """How many of which kind, such as 8 x NVIDIA H100; empty if that is not known."""
        names = self.summary.get("device_names")
        found = [str(name) for name in names] if isinstance(names, list) else []
        return ", ".join(f"{found.count(name)} x {name}" for name in dict.fromkeys(found))

    @property
    def test_interval(self) -> tuple[float, float] | None:
        """95 % interval of the test accuracy; None without a test."""
        accuracy, n = self.figure("test_accuracy"), self.figure("test_n")
        return wilson(accuracy, int(n)) if accuracy is not None and n is not None and n >= 1 else None

    def figure(self, name: str) -> float | None:
        """A number of summary.json; None if it has none of this name, or an impossible one."""
        value = self.summary.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return float(value) if 0 <= value <= (1 if "accuracy" in name else sys.float_info.max) else None


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a device or a folder; reading a pipe would wait for ever."""
    return os.path.lexists(path) and not os.path.isfile(path)  # noqa: PTH113 - Path raises PermissionError


def is_run(directory: Path) -> bool:
    return any(os.path.isfile(directory / name) for name in ("summary.json", "metrics.jsonl", "status.json"))  # noqa: PTH113


def read(directory: Path) -> RunData:
    """The run in `directory`, finished or not, also of another version.

    Raises:
        UserError: the directory holds no run.
    """
    if not is_run(directory):
        missing = "" if directory.exists() else ", because it does not exist"
        raise UserError(
            f"{directory} holds no run{missing}. Give run directories, a folder of them, or a folder of W&B's offline "
            f"runs."
        )
    notes = list[str]()
    try:
        records = read_records(directory / "metrics.jsonl") if not _is_special(directory / "metrics.jsonl") else []
    except OSError as error:
        records = []
        notes.append(f"There are no curves: metrics.jsonl cannot be read ({error.strerror}).")
    summary, status = read_json(directory / "summary.json"), read_json(directory / "status.json")
    if not summary and (directory / "summary.json").exists():
        notes.append("summary.json is damaged, so there are no results.")
    settings = as_text(read_settings(directory / "config.yaml"))
    if not settings:
        notes.append("config.yaml is missing or damaged, so there are no settings.")
    name = settings.get("run.name", "none")
    name = directory.resolve().name if name == "none" else name
    curves = {key: points for key, points in _curves(records) if points}
    state, per_epoch = _state(directory, bool(summary)), steps_per_epoch(records)
    return RunData(directory, name, curves, settings, summary, state, status, notes, steps_per_epoch=per_epoch)


def _state(directory: Path, has_summary: bool) -> str:
    files = run_state.read_files(directory)
    state = run_state.read_states([files])[0].state if files else "unknown"
    if has_summary and state in ("running", "unknown"):  # a run that ends writes its own report
        return "done"
    return state if state in ("done", "running", "killed", "stopped", "failed") else "unknown"


def _curves(records: Sequence[Record]) -> Iterator[tuple[str, Curve]]:
    found: dict[str, Curve] = {}
    for record in records:
        for key, value in record.items():
            if key in LEFT_OUT_KEYS or isinstance(value, (bool, list, dict)):
                continue
            try:
                converted = number(value)
            except ValueError:  # a text of an own hook
                continue
            if converted is not None:
                found.setdefault(key, []).append((record["step"], converted))
    yield from found.items()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a config.yaml by their full names, also of another version; empty if it is damaged."""
    try:
        return _flat(read_entries(path.read_bytes(), path.name))
    except (OSError, UserError):
        return {}


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: "none" if value is None else str(value) for name, value in settings.items()}


def default_settings() -> dict[str, str]:
    """The defaults of this version, as text."""
    return as_text(_flat(read_entries(to_yaml(Config()), "the defaults")))


def _flat(entries: Mapping[str, Entry]) -> dict[str, Any]:
    sections = {section: entry.value for section, entry in entries.items() if isinstance(entry.value, dict)}
    return {f"{section}.{key}": entry.value for section, values in sections.items() for key, entry in values.items()}
