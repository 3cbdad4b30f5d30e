"""Whether runs computed the same, to the bit, and where two of them first differ.

Whatever cannot be read counts as missing, so that damaged runs and runs of other versions can be compared, too.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_dist import cli
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.files import read_json
from cifar_dist.reports.run_data import read_settings
from cifar_dist.reports.run_table import printable
from cifar_dist.tracking.metrics_file import read_records

# Besides those that define a run, settings that change how numbers round, or what is scored.
_ROUNDING = ("run.deterministic", "train.device", "train.compile", "train.channels_last", "train.tf32", "eval.")
_OF_ONE_RUN = ("run.name", "run.dir", "run.resume")
_TIMES = ("seconds", "images_per_second", "data_wait", "gpu_memory_bytes")
_ENVIRONMENT = ("git_commit", "git_diff_sha256", "versions", "device_names", "weights_sha256")
_RESULTS = ("steps", "test_confusion", "test_loss", "model_sha256")
_OTHER_DATA = "other samples or another augmentation"


def refuse(runs: Sequence[Path]) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: fewer than two runs, a run given twice, or a folder that holds no run.
    """
    if len(runs) < 2:
        raise UserError("give at least two run directories.")
    for run in runs:
        if not os.path.isfile(run / "config.yaml"):  # noqa: PTH113 - Path raises PermissionError
            raise UserError(f"{run} is no run directory: it has no config.yaml.")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run directory is given twice.")


def table(runs: Sequence[Path]) -> str:
    """A line per run: number of processes, first 16 digits of data_receipt (last epoch) and model_sha256, accuracy."""
    rows = [["run", "processes", "data_receipt", "model_sha256", "test accuracy"]]
    for run in runs:
        values = read_json(run / "summary.json")
        digests = [str((_receipts(values) or ["-"])[-1])[:16], str(values.get("model_sha256", "-"))[:16]]
        accuracy = values.get("test_accuracy")
        score = f"{accuracy:.2%}" if isinstance(accuracy, float) else "-"
        rows.append([printable(cell) for cell in (str(run), str(values.get("world_size", "-")), *digests, score)])
    return "\n".join(cli.aligned(rows))


def differences(first: Path, second: Path) -> Iterator[str]:
    """Where the results of two runs differ, as far as both have them: data, metrics, checkpoints, summary.

    Of the first three the first difference.
    """
    a, b = (read_json(run / "summary.json") for run in (first, second))
    for epoch, (one, other) in enumerate(zip(_receipts(a), _receipts(b), strict=False), 1):
        if one != other:
            yield f"data: from epoch {epoch} on, {_OTHER_DATA}"
            break
    yield from _metrics(first, second)
    yield from _checkpoints(first, second, compare_data=not (a and b))
    for name in _RESULTS:
        if name in a and name in b and a[name] != b[name]:
            yield f"{name}: {_unequal(a[name], b[name])}"


def undecided(first: Path, second: Path) -> str:
    """Why two runs without a difference may still not be equal; empty if they are."""
    finished = [run for run in (first, second) if "model_sha256" in read_json(run / "summary.json")]
    return "" if len(finished) == 2 else f"only {finished[0]} is finished" if finished else "neither is finished"


def settings(first: Path, second: Path) -> tuple[list[str], list[str]]:
    """The settings that differ: those that may change results, and the others but name and place of the run."""
    from cifar_dist.training.run_directory import FIXED  # imports torch, which takes seconds

    a, b = (read_settings(run / "config.yaml") for run in (first, second))
    found = [f"{run}/config.yaml cannot be read" for run, values in ((first, a), (second, b)) if not values]
    lists: tuple[list[str], list[str]] = (found, [])
    for name in {**a, **b} if not found else ():
        one, other = (values.get(name, "no setting") for values in (a, b))
        if one != other and name not in _OF_ONE_RUN:
            lists[not name.startswith((*FIXED, *_ROUNDING))].append(f"{name} is {one} and {other}")
    return lists


def other_causes(first: Path, second: Path) -> Iterator[str]:
    """What beside settings may make the results of two runs differ: code, versions, kinds of devices, start weights."""
    summaries = [read_json(run / "summary.json") for run in (first, second)]
    if all(summaries):
        one, other = ({name: _plain(values.get(name)) for name in _ENVIRONMENT} for values in summaries)
        yield from (f"{name}: {_unequal(one[name], other[name])}" for name in one if one[name] != other[name])


def _receipts(summary: Mapping[str, Any]) -> list[Any]:
    found = summary.get("data_receipt")
    return found if isinstance(found, list) else []


def _plain(value: Any) -> Any:
    """Of a list of devices the kinds: their number does not matter."""
    return sorted(set(map(str, value))) if isinstance(value, list) else value


def _unequal(one: Any, other: Any) -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in keys)
    texts = str(one), str(other)
    differing = next((k for k, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), 0)
    return " and ".join(text[max(0, differing - 20) :][:45] for text in texts)


def _metrics(first: Path, second: Path) -> Iterator[str]:
    """The first step in which metrics.jsonl differs, of those that both have."""
    a, b = (_by_step(run / "metrics.jsonl") for run in (first, second))
    for step in sorted(a.keys() & b.keys()):
        one, other = a[step], b[step]
        for key in one:
            # Training figures are sums since the line before.
            comparable = not key.startswith("train/") or one["since"] == other.get("since")
            if key != "since" and key in other and comparable and one[key] != other[key]:
                yield f"metrics: from step {step} on; there {key} is {one[key]} and {other[key]}"
                return


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step, times and rates aside; `since`: the step of the training figures before."""
    try:
        records = read_records(path)
    except OSError:
        records = []
    lines, last = dict[int, dict[str, Any]](), 0
    for record in records:
        step = int(record["step"])
        line = lines.setdefault(step, {"since": None})
        line |= {key: value for key, value in record.items() if key not in _TIMES}
        if "train/loss" in record:
            line["since"], last = last, step
    return lines


def _checkpoints(first: Path, second: Path, compare_data: bool) -> Iterator[str]:
    """What differs in the first step of which both have a checkpoint that differs."""
    from cifar_dist.training import checkpoint  # imports torch, which takes seconds

    folders = [run / "checkpoints" for run in (first, second)]
    try:
        steps = set.intersection(*(set(checkpoint.all_steps(folder)) for folder in folders))
    except OSError:  # counts as missing
        return
    for step in sorted(steps):
        paths = [checkpoint.path_of(folder, step) for folder in folders]
        try:
            one, other = (checkpoint.decode(checkpoint.read_verified(path), str(path)) for path in paths)
        except CheckpointError:  # counts as missing
            continue
        if one.get("validation_due") != other.get("validation_due"):
            continue  # a stop postponed the validation, which sets the statistics of batch norm, of one of them
        if compare_data and one.get("receipt") != other.get("receipt"):
            yield f"data: before the checkpoints of step {step}, {_OTHER_DATA}"
        changed = _changed(_tensors(one), _tensors(other))
        if changed:
            yield f"parameters: in the checkpoints of step {step}, {changed}"
            return


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How many tensors differ, and by how much the first; empty if none does."""
    if one.keys() != other.keys() or any((one[k].shape, one[k].dtype) != (other[k].shape, other[k].dtype) for k in one):
        return "of another network, optimizer or number format"
    changed = [name for name in one if not one[name].equal(other[name])]
    if not changed:
        return ""
    largest = (one[changed[0]].double() - other[changed[0]].double()).abs().max().item()
    return f"{len(changed)} of {len(one)} tensors; first {changed[0]}, by up to {largest:.2g}"


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """All tensors of a checkpoint by name: weights, moving average, momentum."""
    parts = {part: state.get(part) or {} for part in ("model", "ema")}
    tensors = {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    for number, values in state.get("optimizer", {}).get("state", {}).items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items() if hasattr(value, "shape")}
    return tensors
