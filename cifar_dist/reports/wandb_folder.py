"""Runs that W&B recorded offline, of any program, read from their .wandb files."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError, explain_os_error
from cifar_dist.reports.run_data import Curve, RunData
from cifar_dist.tracking.wandb_files import HEADER, records, without_password

STEP = "_step"
_RUN = ("display_name", "project", "entity", "run_group", "job_type", "notes", "host")
_ENVIRONMENT = ("os", "python", "cpu_count", "gpu_type", "gpu_count", "cuda_version")
# Names that are not shown: of passwords and keys, and of the command line, which may hold some.
_SECRET = re.compile(
    r"(api|private|access).?key|token(?![a-z])|secret|pass(w|phrase)|pwd|bearer|credential|authorization"
    r"|(?<![a-z])(pass|o?auth)(?![a-z])|^(args|argv|cmd|command)$",
    re.IGNORECASE,
)


@dataclass
class _Segment:
    """One .wandb file: what was recorded from a start or a resume to the end of its process."""

    path: Path
    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    """Names or patterns of metrics, and the metric that they are drawn over."""
    facts: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    starting_step: int = 0
    exit_code: int | None = None
    damage: str = ""


def files_in(path: Path) -> list[Path]:
    """The .wandb files that `path` names: itself, those in a folder of one run, or in a folder of such folders."""
    if path.suffix == ".wandb" and path.is_file():
        return [path]
    if not path.is_dir():
        return []
    nested = path / "wandb" if (path / "wandb").is_dir() else path
    return sorted(path.glob("run-*.wandb")) or sorted(nested.glob("*run-*/run-*.wandb"))


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """The runs in .wandb files, in the order of their first starts; files of one id are one run that was resumed.

    Raises:
        UserError: a file cannot be read, or is no .wandb file.
    """
    by_id: dict[str, list[_Segment]] = {}
    for segment in sorted(map(_read, paths), key=lambda segment: segment.started):
        by_id.setdefault(segment.run_id or segment.path.stem.removeprefix("run-"), []).append(segment)
    return [_joined(run_id, segments) for run_id, segments in by_id.items()]


def _read(path: Path) -> _Segment:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # wandb requires protobuf
    from wandb.proto import wandb_internal_pb2  # here, because it takes half a second

    with explain_os_error(f"{path} cannot be read"):
        data = path.read_bytes()
    if not data.startswith(HEADER[: len(data)]):  # a shorter one has just begun
        raise UserError(f"{path} is no file of W&B, or of a version that is not known here.")
    segment = _Segment(path)
    for content in records(data):
        if isinstance(content, str):
            segment.damage = segment.damage or content
            continue
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at import
        try:
            record.ParseFromString(content)
        except DecodeError:
            segment.damage = segment.damage or "a record cannot be decoded"
            continue
        _take(segment, record)
    return segment


def _take(segment: _Segment, record: Any) -> None:
    """Add a record to what is known of its segment."""
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        segment.run_id, segment.starting_step = run.run_id, run.starting_step
        segment.started = run.start_time.seconds + run.start_time.nanos / 1e9
        segment.config |= _values(run.config.update)
        segment.facts |= {name: value for name in _RUN if (value := getattr(run, name))}
        segment.facts |= {"tags": ", ".join(run.tags)} if run.tags else {}
        segment.facts |= {"git commit": run.git.commit} if run.git.commit else {}  # the remote may hold a token
    elif kind == "config":
        segment.config |= _values(record.config.update)
    elif kind == "history":
        row = _values(record.history.item)
        row.setdefault(STEP, record.history.step.num)
        segment.history.append(row)
    elif kind == "summary":
        segment.summary |= _values(record.summary.update)
    elif kind == "metric" and record.metric.step_metric:
        segment.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    elif kind == "environment":  # which also has the command line and variables of Slurm: not shown
        segment.facts |= {name: str(value) for name in _ENVIRONMENT if (value := getattr(record.environment, name))}
    elif kind == "exit":
        segment.exit_code = record.exit.exit_code


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Values by key; those of nested keys by both parts, as in train.loss. Media and the like are left out."""
    found: dict[str, Any] = {}
    for item in items:
        try:
            value = json.loads(item.value_json)  # which also reads W&B's NaN and Infinity
        except ValueError:
            continue
        found |= _flat(".".join(item.nested_key) or item.key, value)
    # A histogram, a table or an image, whose _type is a key of its own.
    media = [key.removesuffix("_type") for key in found if key.endswith("._type")]
    return {key: value for key, value in found.items() if not key.startswith(("_wandb", *media))}


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _joined(run_id: str, segments: Sequence[_Segment]) -> RunData:
    """One run from its segments in the order of their starts."""
    config, summary, facts, rules = dict[str, Any](), dict[str, Any](), dict[str, str](), dict[str, str]()
    for segment in segments:
        config |= segment.config
        summary |= segment.summary
        facts |= segment.facts
        rules |= segment.step_metrics
    _continue_steps(segments)
    keys = sorted({key for segment in segments for row in segment.history for key in row})  # W&B's order is random
    over = {key: _step_metric(key, rules) for key in keys}
    curves = {key: _curve(segments, key, over[key]) for key in keys if not key.startswith("_") and key != over[key]}
    exit_code = segments[-1].exit_code
    return RunData(
        directory=segments[0].path.parent,
        name=facts.pop("display_name", "") or run_id,
        curves={key: curve for key, curve in curves.items() if curve},
        settings={key: "not shown" if _SECRET.search(key) else _text(value) for key, value in sorted(config.items())},
        summary={
            key: "not shown" if _SECRET.search(key) else value if isinstance(value, int | float) else _text(value)
            for key, value in sorted(summary.items())
            if not key.startswith("_")
        },
        state="running" if exit_code is None else "failed" if exit_code else "done",
        notes=list(_notes(segments)),
        facts={"id": run_id, "started": _time(segments[0].started), **facts},
        x_names={key: "W&B step" if name == STEP else name for key, name in over.items()},
    )


def _continue_steps(segments: Sequence[_Segment]) -> None:
    """Let the steps of each segment follow those before: offline, a resumed run counts from 0 again."""
    last = -1
    for segment in segments:
        if segment.history and segment.history[0][STEP] == 0 <= last and not segment.starting_step:
            for row in segment.history:
                row[STEP] += last + 1
        last = max([last, *(row[STEP] for row in segment.history)])


def _notes(segments: Sequence[_Segment]) -> Iterator[str]:
    for segment in segments:
        if segment.damage:
            yield f"{segment.path.name} is damaged: {segment.damage}. What can be read of it is shown."
    if segments[-1].exit_code is None:
        yield "The recording has no end: the run is running, or was killed."
    if len(segments) > 1:
        yield f"The run was resumed: it is made of {len(segments)} recordings."


def _step_metric(key: str, rules: Mapping[str, str]) -> str:
    exact = rules.get(key)
    matching = (step for pattern, step in rules.items() if "*" in pattern and fnmatch.fnmatchcase(key, pattern))
    return exact or next(matching, STEP)


def _curve(segments: Sequence[_Segment], key: str, over: str) -> Curve:
    """Numbers by rising values of `over`; where a resumed run repeats steps, those of the later segment."""
    curve: Curve = []
    for segment in segments:
        pairs = ((_number(row.get(over)), _number(row.get(key))) for row in segment.history)
        points = sorted(((x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x)), key=_x)
        if points:
            curve = [point for point in curve if point[0] < points[0][0]] + points
    return curve


def _x(point: tuple[float, float]) -> float:
    return point[0]


def _number(value: object) -> float | None:
    """The value as a float, also if it is one of W&B's words for those that are not finite; None for all else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds") if seconds else "unknown"


def _text(value: Any) -> str:
    return without_password(value if isinstance(value, str) else json.dumps(value))
