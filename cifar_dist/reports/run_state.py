"""The state of one run directory, of any version of this project, also damaged or while it changes.

Does not import torch, so that a table appears at once.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cifar_dist.config import NUM_TRAIN, NUM_VALIDATION
from cifar_dist.errors import one_line
from cifar_dist.fault_tolerance.liveness import living_owners
from cifar_dist.fault_tolerance.run_lock import Owner, owner
from cifar_dist.tracking.metrics_file import Record, number, parse_line

State = Literal["running", "killed", "stopped", "failed", "done", "unfinished", "damaged", "unreadable"]
_MAX_BYTES = 10_000_000  # of a file of settings or results
_MAX_NESTED = 500  # libyaml crashes on tens of thousands of nested brackets
_TAILS = (2**14, 2**20)  # bytes at the end of metrics.jsonl in which the last validation is looked for
# Keys by which the files of this project are told from those of other programs.
_OWN_KEYS = {
    "config.yaml": {"model", "train", "optim"},
    "status.json": {"status", "exit_code"},
    "summary.json": {"test_accuracy", "params"},
}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True)
class RunState:
    """What is known of a run; None: unknown. Accuracies are fractions."""

    directory: Path
    state: State
    note: str = ""  # why, in one line
    step: int | None = None
    total_steps: int | None = None
    accuracy: float | None = None  # of the test, one view; before it of the last validation
    accuracy_of: Literal["test", "val"] | None = None
    n: int | None = None
    images_per_second: float | None = None
    seconds: float | None = None  # of training
    devices: int | None = None
    changed: float | None = None  # last change of its files, in seconds since 1970


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory's files, empty where there are none. `problems`: of which file what."""

    directory: Path
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: list[Record]  # the last lines of metrics.jsonl
    problems: Mapping[str, str]
    unreadable: bool  # by permission or another error of the system
    changed: float | None


def read_files(directory: Path) -> RunFiles | None:
    """The files of the run in `directory`; None if it holds no run of this project.

    A directory holds a damaged run if at least two of its files have the names of a run's files and cannot be read.
    """
    found, problems, times, unreadable = dict[str, Any](), dict[str, str](), list[float](), False
    parsers: dict[str, Callable[[Path], tuple[Any, float]]] = {
        "config.yaml": _read_yaml,
        "status.json": _read_object,
        "summary.json": _read_object,
        "metrics.jsonl": _read_tail,
    }
    for name, parse in parsers.items():
        try:
            found[name], modified = parse(directory / name)
            times.append(modified)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems[name], unreadable = error.strerror or str(error), True
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            problems[name] = one_line(error, 80)
    own = any(keys <= found.get(name, {}).keys() for name, keys in _OWN_KEYS.items())
    if not own and len(problems) < 2 and owner(directory) is None:
        return None
    config, status, summary = (found.get(name, {}) for name in _OWN_KEYS)
    records, changed = found.get("metrics.jsonl", []), max(times, default=None)
    return RunFiles(directory, config, status, summary, records, problems, unreadable, changed)


def read_states(runs: Iterable[RunFiles]) -> list[RunState]:
    """The state of each run, whose owners are looked up now."""
    runs = list(runs)
    living = living_owners(files.directory for files in runs)
    return [_state(files, living.get(files.directory)) for files in runs]


def _state(files: RunFiles, living: Owner | None) -> RunState:
    status = files.status
    if status.get("status") == "running" and living is None:  # it may have ended since the file was read
        again = read_files(files.directory)
        files = again or files
        status = files.status
    state, note = _state_and_note(files, living)
    trained = [record for record in files.records if "images_per_second" in record]
    validated = [record for record in files.records if record.get("val/accuracy") is not None]
    last, summary = trained[-1] if trained else {}, files.summary
    score: tuple[Any, Literal["test", "val"] | None, Any] = (None, None, None)
    if summary:
        score = summary.get("test_accuracy"), "test", summary.get("test_n")
    elif validated:
        score = validated[-1]["val/accuracy"], "val", validated[-1].get("val/n")
    return RunState(
        files.directory, state, note,
        step=_whole(files.records[-1]["step"] if files.records else summary.get("steps")),
        total_steps=_whole(summary.get("steps")) or total_steps(files.config),
        accuracy=real(score[0]), accuracy_of=score[1], n=_whole(score[2]),
        images_per_second=real(summary.get("images_per_second", last.get("images_per_second"))),
        seconds=real(summary.get("train_seconds", last.get("seconds"))),
        devices=_whole(summary.get("world_size", status.get("world_size"))),
        changed=files.changed,
    )  # fmt: skip


def _state_and_note(files: RunFiles, living: Owner | None) -> tuple[State, str]:
    status, lines = files.status, str(files.status.get("message") or "").splitlines()
    said, code, message = status.get("status"), status.get("exit_code"), (lines or [""])[0]
    # A new start owns the directory before it has written its own status.
    if living is not None and (said not in ("done", "stopped", "failed") or status.get("pid") != living.pid):
        return "running", str(living)
    if files.problems:
        problems = "; ".join(f"{name}: {problem}" for name, problem in sorted(files.problems.items()))
        return "unreadable" if files.unreadable else "damaged", problems
    if said == "failed":
        return "failed", f"exit code {code}: {message}"
    if said == "stopped":
        return "stopped", message
    if files.summary:  # written at the end, so a process that is gone had little left to do
        return "done", ""
    if said == "running":
        process = f"process {status.get('pid')} on {status.get('host')}"
        return "killed", f"{process} is gone; last checkpoint: step {status.get('last_checkpoint_step')}"
    if said == "done":
        return "damaged", "summary.json is missing"
    return "unfinished", "no status.json; of an older version, or copied in part"


def total_steps(config: Mapping[str, Any]) -> int | None:
    """The optimizer steps of a run with these settings; None if they do not tell."""
    try:
        train, data = config["train"], config["data"]
        if train.get("max_steps") is not None:
            return int(train["max_steps"])
        available = NUM_TRAIN if data["train_on"] == "all" else NUM_TRAIN - NUM_VALIDATION
        samples = data["subset"] if data.get("subset") is not None else available
        return int(train["epochs"]) * (int(samples) // int(train["batch_size"]))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def _read(path: Path, num_bytes: int) -> tuple[bytes, bool, float]:
    """The last bytes of a file, whether these are all, and the time of its last change."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for the writer of a pipe
    with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "it is no file")
        file.seek(max(0, found.st_size - num_bytes))
        return file.read(num_bytes), found.st_size <= num_bytes, found.st_mtime


def _read_whole(path: Path) -> tuple[bytes, float]:
    data, whole, changed = _read(path, _MAX_BYTES)
    if not whole:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    return data, changed


def _read_object(path: Path) -> tuple[dict[str, Any], float]:
    data, changed = _read_whole(path)
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    return values, changed


def _read_yaml(path: Path) -> tuple[dict[str, Any], float]:
    data, changed = _read_whole(path)
    if sum(map(data.count, b"[{-?")) > _MAX_NESTED:
        raise ValueError("it is no configuration")
    values = yaml.load(data, Loader=_Loader)
    if not isinstance(values, dict):
        raise ValueError("it holds no settings")
    return values, changed


def _read_tail(path: Path) -> tuple[list[Record], float]:
    """The last records of a metrics.jsonl, up to the last validation if that is not far."""
    records, data, changed = list[Record](), b"", 0.0
    for num_bytes in _TAILS:
        data, whole, changed = _read(path, num_bytes)
        records = [record for line in data.splitlines() if (record := parse_line(line)) is not None]
        if whole or any("val/accuracy" in record for record in records):
            break
    if data.strip() and not records:
        raise ValueError("it has no line that can be read")
    return records, changed


def real(value: Any) -> float | None:
    """The value as a float; None if it is no number."""
    try:
        return number(value)
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
