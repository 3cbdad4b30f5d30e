"""Reads finished runs from config.yaml and summary.json, and refuses runs that do not belong in one table.

Does not import torch, so that a table appears at once. Every refusal is a UserError.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import from_tree, validate_for_table
from cifar_dist.config import NUM_TEST, Config
from cifar_dist.errors import UserError

# Settings that may differ between the runs of one table: name, seed, paths, tracking.
_MAY_DIFFER = {
    "run.name", "run.dir", "run.seed", "run.resume", "run.stall_timeout_s", "data.dir", "data.source",
    "data.stage_dir", "track.wandb", "track.project",
}  # fmt: skip
# What is read from summary.json, with the types that `isinstance` expects.
FIGURES: Mapping[str, Any] = {
    "seed": int, "val_accuracy": float | None, "val_n": int | None, "test_accuracy": float,
    "test_accuracy_tta": float | None, "test_n": int, "train_seconds": float, "images_per_second": float,
    "steps": int, "epochs": float, "batch_size": int, "micro_batch_size": int, "params": int, "precision": str,
    "git_commit": str | None, "model_sha256": str, "data_receipt": list, "world_size": int, "device_names": list,
    "versions": dict, "command": str,
}  # fmt: skip
# The setting that decides a figure.
_SETTING_OF = {
    "seed": "run.seed", "batch_size": "train.batch_size", "micro_batch_size": "train.micro_batch_size",
    "steps": "train.max_steps", "test_accuracy_tta": "eval.tta", "val_accuracy": "data.train_on",
}  # fmt: skip
_MAX_LINES = 12  # of one message, so that it fits on a screen


@dataclass(frozen=True)
class FinishedRun:
    """`figures` are the values of summary.json that FIGURES names."""

    directory: Path
    config: Config
    figures: Mapping[str, Any]


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories among `paths`, which are run directories, their summary.json, or folders of them."""
    found = []
    for path in paths:
        folder = path.parent if path.name == "summary.json" else path
        if _holds_run(folder) or not folder.is_dir():
            found.append(folder)  # read_run reports what is missing
        elif inside := sorted(filter(_holds_run, folder.iterdir())):
            found += inside
        else:
            raise UserError(f"{folder} holds no run: neither it nor a folder in it has a config.yaml.")
    return found


def _holds_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.yaml", "summary.json", "checkpoints"))


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """The runs that `run_directories` finds, in the order of their seeds; they must differ in the seed only.

    If some cannot be used, the message names each of them.
    """
    runs, problems = [], []
    for directory in run_directories(paths):
        try:
            runs.append(read_run(directory))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(_listed(problems))
    runs.sort(key=lambda run: run.config.run.seed)
    _refuse_unequal(runs)
    return runs


def read_run(directory: Path) -> FinishedRun:
    """The run in `directory`, which must be finished, with a summary.json that fits its config.yaml."""
    path = directory / "summary.json"
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist.")
    if not path.exists():
        raise UserError(f"{directory} is not finished: it has no summary.json. Resume it with --run.resume auto.")
    config = _read_config(directory)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        problems = list(_problems(values, config)) if isinstance(values, dict) else ["it holds no keys and values"]
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        problems = [str(error)]
    if problems:
        raise UserError(
            f"{path} is damaged, or of another run: {'; '.join(problems[:3])}. Remove it and resume the run with "
            f"--run.resume auto, which scores it again."
        )
    return FinishedRun(directory, config, {name: values[name] for name in FIGURES})


def _problems(values: dict[str, Any], config: Config) -> Iterator[str]:
    """What is missing or impossible in a summary.json beside `config`."""
    for name, kind in FIGURES.items():
        value = values.get(name)
        valid = isinstance(value, kind) and not isinstance(value, bool)  # to Python True is an integer
        if valid and isinstance(value, int | float):  # NaN fails every comparison
            valid = 0 <= value <= 1 if "accuracy" in name else 0 <= value < math.inf
        if not valid:
            yield f"{name} is {value!s:.40}" if name in values else f"{name} is missing"
    settings = settings_of(config) | {"run.seed": config.run.seed}
    for name, setting in _SETTING_OF.items():
        value, wanted = values.get(name), settings[setting]
        absent = wanted in ("none", "all")  # for an accuracy; train.max_steps may be None
        if (value is None) != absent if "accuracy" in name else wanted not in (None, value):
            yield f"{name} is {value}, but {setting} {wanted}"


def _read_config(directory: Path) -> Config:
    path = directory / "config.yaml"
    try:
        return from_tree(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that all runs of one table have in common, by their full names."""
    sections = asdict(config).items()
    values = {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
    return {name: value for name, value in values.items() if name not in _MAY_DIFFER}


def changes(old: Config, new: Config, form: str) -> list[str]:
    """A line of `form`, with {name}, {old} and {new}, for each setting that differs."""
    after = settings_of(new)
    return [form.format(name=name, old=a, new=after[name]) for name, a in settings_of(old).items() if a != after[name]]


def _listed(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "\n  ".join([*lines[:_MAX_LINES], *more])


def refuse_other_settings(directories: Sequence[Path], asked: Config) -> None:
    """Refuse to train with `asked` where a directory already holds a run with other settings, finished or not.

    Stricter than resuming, which accepts changes of logging, scoring and the precision of matrix products.
    """
    validate_for_table(asked)
    begun = [directory for directory in directories if _holds_run(directory)]
    for directory in begun:
        if changed := changes(_read_config(directory), asked, "{name} was {old}, is now {new}"):
            text = _listed([f"{directory} holds a run with other settings:", *changed])
            raise UserError(f"{text}\nChoose another --run.name, or give the old values.")
    read_runs([directory for directory in begun if (directory / "summary.json").exists()])


def _refuse_unequal(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs whose scores have no common mean."""
    for run in runs:
        if run.figures["test_n"] != NUM_TEST:
            raise UserError(
                f"{run.directory / 'summary.json'} has the score of {run.figures['test_n']:,} of the {NUM_TEST:,} test "
                f"images (eval.test_subset), which does not belong in a table of results. Remove that file and resume "
                f"the run with --run.resume auto, without eval.test_subset: it is scored again."
            )
    for first, second in combinations(runs, 2):
        pair, a, b = f"{first.directory} and {second.directory}", first.figures, second.figures
        if a["seed"] == b["seed"]:
            raise UserError(f"{pair} both have seed {a['seed']}; each seed counts once.")
        if a["model_sha256"] == b["model_sha256"]:
            raise UserError(f"{pair} have the same trained model, so one is a copy of the other.")
        if changed := changes(first.config, second.config, "{name} is {old} in the first, {new} in the second"):
            raise UserError(_listed([f"{pair} differ in more than the seed:", *changed]))
        for name in ("val_n", "steps", "params", "precision"):  # precision also depends on the device
            if a[name] != b[name]:
                raise UserError(f"{pair} did not do the same: {name} is {a[name]} and {b[name]}.")
