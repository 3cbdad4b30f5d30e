"""Reads finished runs from config.yaml and summary.json, and refuses runs that do not belong in one table.

Does not import torch, so that a table appears at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
_MAX_LINES = 12  # of one message, so that it fits on a screen


@dataclass(frozen=True)
class FinishedRun:
    """`figures` are the values of summary.json that FIGURES names."""

    directory: Path
    config: Config
    figures: Mapping[str, Any]


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories among `paths`, which are run directories, their summary.json, or folders of them.

    Raises:
        UserError: a folder has no run in it.
    """
    found = []
    for path in paths:
        if path.name == "summary.json":
            found.append(path.parent)
        elif not path.is_dir() or _holds_run(path):
            found.append(path)  # read_runs reports what is missing
        else:
            inside = sorted(child for child in path.iterdir() if _holds_run(child))
            if not inside:
                raise UserError(f"{path} holds no run: neither it nor a folder in it has a config.yaml.")
            found += inside
    return found


def _holds_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.yaml", "summary.json", "checkpoints"))


def read_comparable(paths: Sequence[Path]) -> list[FinishedRun]:
    """The runs that `run_directories` finds, in the order of their seeds.

    Raises:
        UserError: from `run_directories`, `read_runs` and `refuse_unequal`.
    """
    runs = read_runs(run_directories(paths))
    refuse_unequal(runs)
    return runs


def read_runs(directories: Sequence[Path]) -> list[FinishedRun]:
    """The finished runs in `directories`, in the order of their seeds.

    Raises:
        UserError: runs are missing, unfinished or damaged; the message names each of them.
    """
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(_read_run(directory))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(_first(problems)))
    return sorted(runs, key=lambda run: run.config.run.seed)


def _read_run(directory: Path) -> FinishedRun:
    path = directory / "summary.json"
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist.")
    if not path.exists():
        raise UserError(f"{directory} is not finished: it has no summary.json. Resume it with --run.resume auto.")
    config = _read_config(directory)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        problems = list(_invalid_figures(values))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # neither JSON nor UTF-8
        problems = [str(error)]
    if problems:
        again = "Remove it and resume the run with --run.resume auto, which scores it again."
        raise UserError(f"{path} is damaged: {'; '.join(problems[:3])}. {again}")
    contradictions = list(_contradictions(values, config))
    if contradictions:
        raise UserError(f"{path} does not belong to the config.yaml beside it: {'; '.join(contradictions)}.")
    return FinishedRun(directory, config, {name: values[name] for name in FIGURES})


def _invalid_figures(values: Any) -> Iterator[str]:
    """What is missing or impossible in the contents of a summary.json."""
    if not isinstance(values, dict):
        yield "it holds no keys and values"
        return
    for name, kind in FIGURES.items():
        value = values.get(name)
        # To Python True is an integer. NaN fails every comparison.
        valid = isinstance(value, kind) and not isinstance(value, bool)
        if valid and isinstance(value, int | float):
            valid = 0 <= value <= 1 if "accuracy" in name else 0 <= value < math.inf
        if name not in values:
            yield f"{name} is missing"
        elif not valid:
            yield f"{name} is {value!s:.40}"


def _contradictions(figures: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Figures that a run with `config` cannot have."""
    train, tta, train_on = config.train, config.eval.tta, config.data.train_on
    for name, setting, value in (
        ("seed", "run.seed", config.run.seed),
        ("batch_size", "train.batch_size", train.batch_size),
        ("micro_batch_size", "train.micro_batch_size", train.micro_batch_size),
        ("steps", "train.max_steps", figures["steps"] if train.max_steps is None else train.max_steps),
    ):
        if figures[name] != value:
            yield f"{name} is {figures[name]}, but {setting} {value}"
    if (figures["test_accuracy_tta"] is None) != (tta == "none"):
        yield f"test_accuracy_tta is {figures['test_accuracy_tta']}, but eval.tta {tta}"
    if any((figures[name] is None) != (train_on == "all") for name in ("val_accuracy", "val_n")):
        yield f"val_accuracy is {figures['val_accuracy']}, but data.train_on {train_on}"


def _read_config(directory: Path) -> Config:
    path = directory / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return from_tree(tree, str(path))


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each setting that differs, by its full name."""
    before, after = asdict(old), asdict(new)
    pairs = {f"{section}.{key}": (a, after[section][key]) for section in before for key, a in before[section].items()}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def shared_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings, by section, that all runs of one table have in common."""
    sections = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in _MAY_DIFFER}
        for section, values in asdict(config).items()
    }
    return {section: values for section, values in sections.items() if values}


def _differences(old: Config, new: Config, form: str) -> str:
    """The settings that must not differ within a table but do, one per line; empty if there are none."""
    changed = {name: pair for name, pair in changed_settings(old, new).items() if name not in _MAY_DIFFER}
    return "".join(_first([f"\n  {form.format(key=key, old=a, new=b)}" for key, (a, b) in changed.items()], "\n  "))


def _first(lines: Sequence[str], before: str = "") -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - _MAX_LINES
    return [*lines[:_MAX_LINES], *([f"{before}and {rest} more"] if rest > 0 else [])]


def refuse_other_settings(directories: Sequence[Path], asked: Config) -> None:
    """Refuse to train with `asked` where a directory already holds a run with other settings, finished or not.

    Stricter than resuming, which accepts changes of logging, scoring and the precision of matrix products.

    Raises:
        UserError: there is such a run, or a finished run that cannot be used; or `asked` has eval.test_subset.
    """
    validate_for_table(asked)
    begun = [directory for directory in directories if _holds_run(directory)]
    for directory in begun:
        changed = _differences(_read_config(directory), asked, "{key} was {old}, is now {new}")
        if changed:
            keep = "Give the old values, or choose" if "eval.test_subset" not in changed else "Choose"
            raise UserError(f"{directory} holds a run with other settings:{changed}\n{keep} another --run.name.")
    refuse_unequal(read_runs([directory for directory in begun if (directory / "summary.json").exists()]))


def refuse_unequal(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs whose scores have no common mean.

    Raises:
        UserError: a run was scored on part of the test set; two have the same seed or the same model; or they differ
            in a setting or in what they did.
    """
    for k, run in enumerate(runs):
        if run.figures["test_n"] != NUM_TEST:
            raise UserError(
                f"{run.directory / 'summary.json'} has the score of {run.figures['test_n']:,} of the {NUM_TEST:,} test "
                f"images (eval.test_subset), which does not belong in a table of results. Remove that file and resume "
                f"the run with --run.resume auto, without eval.test_subset: it is scored again."
            )
        for other in runs[:k]:
            pair = f"{other.directory} and {run.directory}"
            if run.figures["seed"] == other.figures["seed"]:
                raise UserError(f"{pair} both have seed {run.figures['seed']}; each seed counts once.")
            if run.figures["model_sha256"] == other.figures["model_sha256"]:
                raise UserError(f"{pair} have the same trained model, so one is a copy of the other.")
        first = runs[0]
        pair = f"{first.directory} and {run.directory}"
        changed = _differences(first.config, run.config, "{key} is {old} in the first, {new} in the second")
        if changed:
            raise UserError(f"{pair} differ in more than the seed:{changed}")
        for name in ("val_n", "steps", "params", "precision"):  # precision also depends on the device
            if run.figures[name] != first.figures[name]:
                raise UserError(f"{pair} did not do the same: {name} is {first.figures[name]} and {run.figures[name]}.")
