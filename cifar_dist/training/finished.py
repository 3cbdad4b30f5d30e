"""Finished runs, read back from config.yaml and summary.json, and which of them may stand in one table.

Nothing here needs torch, so that a table is there at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import from_tree
from cifar_dist.config import NUM_TEST, Config
from cifar_dist.errors import UserError
from cifar_dist.limits import validate_for_table

# What runs of one table may differ in: which of them they are, where files lie, and who is told.
_FREE = {
    "run": {"name", "dir", "seed", "resume", "stall_timeout_s"},
    "data": {"dir", "source", "stage_dir"},
    "track": {"wandb", "project"},
}
# What is taken from a summary.json, and the types that it must have there.
FIGURES: Mapping[str, tuple[type, ...]] = {
    "seed": (int,), "val_accuracy": (float, type(None)), "val_n": (int, type(None)), "test_accuracy": (float,),
    "test_accuracy_tta": (float, type(None)), "test_n": (int,), "train_seconds": (float,),
    "images_per_second": (float,), "steps": (int,), "epochs": (float,), "batch_size": (int,),
    "micro_batch_size": (int,), "params": (int,), "precision": (str,), "git_commit": (str, type(None)),
    "model_sha256": (str,), "data_receipt": (list,), "world_size": (int,), "device_names": (list,),
    "versions": (dict,), "command": (str,),
}  # fmt: skip
_MAX_LINES = 12  # of one message, so that it fits a screen
_AGAIN = "Remove it and go on with the run by --run.resume auto, which scores it again."


@dataclass(frozen=True)
class FinishedRun:
    """`figures` are those of its summary.json that FIGURES names."""

    directory: Path
    config: Config
    figures: Mapping[str, Any]


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """The directories of the runs that `paths` name: run directories, their summary.json, or folders of them.

    Raises:
        UserError: a folder has no run in it.
    """
    found = []
    for path in paths:
        if path.name == "summary.json":
            found.append(path.parent)
        elif not path.is_dir() or _holds_run(path):
            found.append(path)  # whether it is there and finished, reading it says
        else:
            inside = sorted(child for child in path.iterdir() if _holds_run(child))
            if not inside:
                raise UserError(f"{path} holds no run: there is no config.yaml in it or in a folder of it.")
            found += inside
    return found


def _holds_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.yaml", "summary.json", "checkpoints"))


def read_runs(directories: Sequence[Path]) -> list[FinishedRun]:
    """The finished runs in `directories`, in the order of their seeds.

    Raises:
        UserError: some are missing, unfinished or damaged; the message has all of them.
    """
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(_read_run(directory))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(_few(problems))
    return sorted(runs, key=lambda run: run.config.run.seed)


def _read_run(directory: Path) -> FinishedRun:
    path = directory / "summary.json"
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist.")
    if not path.exists():
        raise UserError(f"{directory} is not finished: it has no summary.json. Go on with it by --run.resume auto.")
    config = _read_config(directory)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # what is no UTF-8 raises it too
        raise UserError(f"{path} is damaged: {error}. {_AGAIN}") from None
    wrong = _wrong_figures(values)
    if wrong:
        raise UserError(f"{path} is damaged: {'; '.join(wrong[:3])}. {_AGAIN}")
    contradictions = _contradictions(values, config)
    if contradictions:
        raise UserError(f"{path} is not of the settings in the config.yaml beside it: {'; '.join(contradictions)}.")
    return FinishedRun(directory, config, {name: values[name] for name in FIGURES})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _wrong_figures(values: Any) -> list[str]:
    if not isinstance(values, dict):
        return ["it holds no keys and values"]
    wrong = []
    for name, types in FIGURES.items():
        if name not in values:
            wrong.append(f"{name} is missing")
            continue
        value = values[name]
        high = 1.0 if "accuracy" in name else math.inf
        if isinstance(value, bool):  # which Python counts among the integers
            fits = False
        elif isinstance(value, int | float):
            fits = (float in types or type(value) in types) and 0 <= value <= high and value != math.inf
        else:
            fits = isinstance(value, types)
        if not fits:
            wrong.append(f"{name} is {str(value)[:40]}")
    return wrong


def _contradictions(figures: Mapping[str, Any], config: Config) -> list[str]:
    """Where a summary cannot be of a run with `config`."""
    train, tta, train_on = config.train, config.eval.tta, config.data.train_on
    settings = [
        ("seed", "run.seed", config.run.seed),
        ("batch_size", "train.batch_size", train.batch_size),
        ("micro_batch_size", "train.micro_batch_size", train.micro_batch_size),
        ("steps", "train.max_steps", figures["steps"] if train.max_steps is None else train.max_steps),
    ]
    found = [f"{name} {figures[name]}, but {key} {value}" for name, key, value in settings if figures[name] != value]
    if (figures["test_accuracy_tta"] is None) != (tta == "none"):
        found.append(f"test_accuracy_tta {figures['test_accuracy_tta']}, but eval.tta {tta}")
    if {figures["val_accuracy"] is None, figures["val_n"] is None} != {train_on == "all"}:
        found.append(f"val_accuracy {figures['val_accuracy']}, but data.train_on {train_on}")
    return found


def _read_config(directory: Path) -> Config:
    path = directory / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return from_tree(tree, str(path), "train")


def shared_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings, by section, that all runs of one table have in common."""
    return {
        section: {key: value for key, value in values.items() if key not in _FREE.get(section, ())}
        for section, values in asdict(config).items()
        if values.keys() > _FREE.get(section, set())
    }


def _differences(old: Config, new: Config, form: str) -> str:
    """The shared settings that are not equal, as lines of the given form; empty if there are none."""
    before, after = shared_settings(old), shared_settings(new)
    pairs = [(f"{s}.{k}", before[s][k], after[s][k]) for s in before for k in before[s]]
    return _few([f"\n  {form.format(key=key, old=a, new=b)}" for key, a, b in pairs if a != b], "")


def _few(lines: Sequence[str], separator: str = "\n") -> str:
    more = [f"\n  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return separator.join(lines[:_MAX_LINES]) + "".join(more)


def refuse_others(directories: Sequence[Path], asked: Config) -> None:
    """Refuse to train with `asked` where a directory holds a run, begun or finished, of other settings.

    Training itself lets a run go on with another logging, scoring or precision of GPU products; a table does not.

    Raises:
        UserError: a directory holds a run of other settings, which the message names, or a finished run that cannot be
            used; or `asked` has eval.test_subset.
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
    """Refuse runs over which no mean can be taken.

    Raises:
        UserError: one scored a part of the test set only; two have the same seed or the same model; or they differ in a
            setting or in what they did.
    """
    for k, run in enumerate(runs):
        if run.figures["test_n"] != NUM_TEST:
            raise UserError(
                f"{run.directory / 'summary.json'} has the score of {run.figures['test_n']:,} of the {NUM_TEST:,} test "
                f"images (eval.test_subset), which stands in no table of results. Remove that file, and "
                f"go on with the run by --run.resume auto and without eval.test_subset: it is scored again."
            )
        for other in runs[:k]:
            where = f"{other.directory} and {run.directory}"
            if run.figures["seed"] == other.figures["seed"]:
                raise UserError(f"{where} are both of seed {run.figures['seed']}; each seed counts once.")
            if run.figures["model_sha256"] == other.figures["model_sha256"]:
                raise UserError(f"{where} ended with the same model, so one is a copy of the other.")
        first = runs[0]
        where = f"{first.directory} and {run.directory}"
        changed = _differences(first.config, run.config, "{key} is {old} in the first, {new} in the second")
        if changed:
            raise UserError(f"{where} differ in more than the seed:{changed}")
        for name in ("val_n", "steps", "params", "precision"):  # the last follows from the device, too
            if run.figures[name] != first.figures[name]:
                values = f"{first.figures[name]} and {run.figures[name]}"
                raise UserError(f"{where} did not do the same: {name} is {values}.")
