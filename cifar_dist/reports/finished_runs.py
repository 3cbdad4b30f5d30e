"""Reads finished runs from config.yaml and summary.json, and refuses runs that do not belong in one table.

Does not import torch, so that a table appears at once. Every refusal is a UserError.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from cifar_dist import cli
from cifar_dist.config import NUM_TEST, Config
from cifar_dist.errors import UserError, explain_os_error
from cifar_dist.files import read_json

# Settings, or the beginning of their names, that may differ between the runs of one table: name, seed, paths, tracking.
MAY_DIFFER = (
    "run.name", "run.dir", "run.seed", "run.resume", "run.stall_timeout_s", "data.dir", "data.source",
    "data.stage_dir", "track.",
)  # fmt: skip
# What is read from summary.json, with the types that `isinstance` expects. Accuracies are fractions.
FIGURES: Mapping[str, Any] = {
    "seed": int, "val_accuracy": float, "val_n": int, "test_accuracy": float, "test_accuracy_tta": float,
    "test_n": int, "train_n": int, "train_seconds": float, "first_step_seconds": float | None,
    "images_per_second": float, "steps": int, "epochs": float, "batch_size": int, "micro_batch_size": int,
    "params": int, "precision": str, "git_commit": str | None, "model_sha256": str, "data_receipt": list,
    "world_size": int, "device_names": list, "versions": dict, "command": str, "weights_sha256": str | None,
}  # fmt: skip
# Figures that are equal in runs with a common mean. With equal settings they may differ: the device can decide the
# precision, and the file of model.weights can change.
EQUAL = ("val_n", "steps", "params", "precision", "weights_sha256")


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
        with explain_os_error(f"{folder} cannot be read"):
            if _holds_run(folder) or not folder.is_dir():
                found.append(folder)  # _read_run reports what is missing
            else:
                found += sorted(filter(_holds_run, folder.iterdir())) or [folder]
    return found


def _holds_run(directory: Path, names: Sequence[str] = ("config.yaml", "summary.json", "checkpoints")) -> bool:
    """Whether `directory` has one of `names`. A directory that cannot be read is refused, as it may hold a run."""
    with explain_os_error(f"{directory} cannot be read"):
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                (directory / name).stat()
                return True
    return False


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """The runs that `run_directories` finds, in the order of their seeds; they must differ in the seed only.

    If some cannot be used, the message names each of them.
    """
    runs, problems = [], []
    for directory in run_directories(paths):
        try:
            runs.append(_read_run(directory))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(_one_screen(problems))
    runs.sort(key=lambda run: run.config.run.seed)
    _refuse_unequal(runs)
    return runs


def _read_run(directory: Path) -> FinishedRun:
    """The run in `directory`, which must be finished, with a summary.json that fits its config.yaml."""
    path = directory / "summary.json"
    with explain_os_error(f"{directory} cannot be read"):
        if not directory.is_dir():
            raise UserError(f"{directory} {'is no folder' if directory.exists() else 'does not exist'}.")
        if not _holds_run(directory):
            raise UserError(f"{directory} holds no run.")
        if not path.exists():
            raise UserError(
                f"{directory} holds no finished run: no summary.json. Resume the run with --run.resume auto."
            )
    with explain_os_error(f"{path} cannot be read"):
        path.open("rb").close()  # `read_json` takes a file that cannot be read for a damaged one
    config, values = cli.read_yaml(directory / "config.yaml"), read_json(path)
    problems = list(_problems(values, config))
    if problems:
        raise UserError(
            f"{path} is damaged, of another run, or of a trial with eval.test_subset: {'; '.join(problems[:3])}. "
            f"Remove it and resume the run with --run.resume auto, without eval.test_subset: it is scored again."
        )
    return FinishedRun(directory, config, {name: values.get(name) for name in FIGURES})


def _problems(values: Mapping[str, Any], config: Config) -> Iterator[str]:
    """What is missing (None) or impossible in a summary.json beside `config`."""
    wanted: dict[str, int | None] = {
        "seed": config.run.seed,
        "batch_size": config.train.batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "test_n": NUM_TEST,
    }
    if config.data.train_on == "all":
        wanted |= {"val_accuracy": None, "val_n": None}
    if config.eval.tta == "none":
        wanted |= {"test_accuracy_tta": None}
    for name, kind in FIGURES.items():
        value = values.get(name)
        valid = value == wanted[name] if name in wanted else isinstance(value, kind)
        if valid and isinstance(value, int | float):  # NaN fails every comparison
            valid = 0 <= value <= 1 if "accuracy" in name else 0 <= value < math.inf
        if valid and isinstance(value, list):
            valid = all(isinstance(each, str) for each in value)
        if not valid:
            yield f"{name} is {value!s:.40}" + (f", not {wanted[name]}" if name in wanted else "")


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that all runs of one table have in common, by their full names."""
    return {name: value for name, value in cli.settings_of(config).items() if not name.startswith(MAY_DIFFER)}


def _differences(first: Config, second: Config) -> str:
    """Each setting that differs, with both values; empty if none does."""
    a, b = settings_of(first), settings_of(second)
    return _one_screen([f"{name}: {a[name]} and {b[name]}" for name in a if a[name] != b[name]])


def _one_screen(lines: Sequence[str]) -> str:
    """The first twelve lines, and how many more there are."""
    more = [f"and {len(lines) - 12} more"] if len(lines) > 12 else []
    return "\n  ".join([*lines[:12], *more])


def refuse_other_settings(directories: Sequence[Path], asked: Config) -> None:
    """Refuse to train with `asked` where a directory already holds a run with other settings, finished or not.

    Stricter than resuming, which accepts changes of logging, scoring and the precision of matrix products.
    """
    cli.validate_for_table(asked)
    files = ("config.yaml", "summary.json")  # a run that was refused leaves neither, but an empty folder checkpoints/
    begun = [path for path in directories if _holds_run(path, files) or any(path.glob("checkpoints/step-*.pt"))]
    for directory in begun:
        if differences := _differences(cli.read_yaml(directory / "config.yaml"), asked):
            raise UserError(
                f"the run in {directory} and the settings given now differ:\n  {differences}\n"
                f"Choose another --run.name, or give the settings of that run."
            )
    read_runs([directory for directory in begun if (directory / "summary.json").exists()])


def _refuse_unequal(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs whose scores have no common mean."""
    for first, second in combinations(runs, 2):
        pair, a, b = f"{first.directory} and {second.directory}", first.figures, second.figures
        if a["seed"] == b["seed"]:
            raise UserError(f"{pair} both have seed {a['seed']}; each seed counts once.")
        if a["model_sha256"] == b["model_sha256"]:
            raise UserError(f"{pair} have the same trained model, so one is a copy of the other.")
        if differences := _differences(first.config, second.config):
            raise UserError(f"{pair} differ in more than the seed:\n  {differences}")
        for name in EQUAL:
            if a[name] != b[name]:
                raise UserError(f"{pair} did not do the same: {name} is {a[name]} and {b[name]}.")
