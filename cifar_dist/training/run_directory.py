"""The run directory: its path, and the checkpoint to resume from. Used on rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import from_tree
from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.training import checkpoint

# Settings that decide which numbers a run computes. All others may change when it resumes.
_DECISIVE = ("model", "optim", "augment")
_DECISIVE_KEYS = {
    "run": ("seed",),
    "data": ("subset", "train_on"),
    "train": ("epochs", "max_steps", "batch_size", "micro_batch_size", "precision"),
}

_HOW_TO_CONTINUE = "Give the old values, or start a new run under another --run.name without --run.resume."


def path_of(config: Config) -> Path:
    """The directory that a run with `config` gets if it starts now."""
    if config.run.dir is not None:
        return config.run.dir
    if config.run.name is not None:
        return Path("runs") / config.run.name
    stem = f"{config.model.name}-seed{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory, n = Path("runs") / stem, 1
    while directory.exists():
        n += 1
        directory = Path("runs") / f"{stem}-{n}"
    return directory


def create(config: Config) -> Path:
    """Create the directory.

    Raises:
        UserError: it cannot be written.
    """
    directory = path_of(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(directory, error) from None
    return directory


def not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(f"the run directory {directory} cannot be written: {error.strerror}. Choose another --run.dir.")


def check(config: Config, directory: Path) -> None:
    """Refuse a directory that holds a run, unless `run.resume` is auto. Call with the run lock held.

    Temporary files of a process that was killed while writing are removed.

    Raises:
        UserError: it holds a run.
    """
    if config.run.resume != "auto" and holds_run(directory):
        raise UserError(
            f"the run directory {directory} already holds a run. Resume it by --run.resume auto, or choose another "
            f"--run.name."
        )
    for temporary in directory.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
    checkpoint.sweep(directory / "checkpoints")


def holds_run(directory: Path) -> bool:
    return (directory / "config.yaml").exists() or bool(checkpoint.all_steps(directory / "checkpoints"))


def name(config: Config, directory: Path) -> str:
    """The run's name for people."""
    return config.run.name or directory.resolve().name


def find_start(config: Config, directory: Path, log: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The checkpoint to resume from, with its bytes; None to start at step 0. `log` gets a line per skipped file.

    Raises:
        CheckpointError: it is damaged, or of a run with other settings.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return newest_valid(directory / "checkpoints", log, partial(_difference, config))
    path = Path(config.run.resume)
    data = checkpoint.read_verified(path, need_digest=False)
    difference = _difference(config, checkpoint.decode(data, str(path)), path)
    if difference:
        raise CheckpointError(f"{path} {difference}\n{_HOW_TO_CONTINUE}")
    return path, data


def newest_valid(
    directory: Path, warn: Callable[[str], None], differs: Callable[[dict[str, Any], Path], str] = lambda *_: ""
) -> tuple[Path, bytes] | None:
    """The newest checkpoint that is valid and belongs to this run, with its bytes; None if there are no checkpoints.

    Newer valid checkpoints of other runs are renamed, so that checkpoint.retain does not remove them.

    Args:
        warn: gets a line about each skipped checkpoint.
        differs: how a state differs from this run's settings, as the end of a sentence; empty if it does not.

    Raises:
        CheckpointError: there are checkpoints, but none is valid, or none belongs to this run.
    """
    steps = checkpoint.all_steps(directory)
    others: list[tuple[Path, str]] = []
    for step in reversed(steps):
        path = checkpoint.path_of(directory, step)
        try:
            data = checkpoint.read_verified(path)
        except CheckpointError as error:
            warn(f"warning: skipped: {error}")
            continue
        unfit = _unfit(data, step, path, differs)
        if unfit:
            others.append((path, unfit))
            continue
        for other, why in others:
            warn(f"warning: skipped, and renamed to {_set_aside(other).name}: {other} {why}")
        return path, data
    if others:
        raise CheckpointError(f"{others[0][0]} {others[0][1]}\n{_HOW_TO_CONTINUE}")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {directory} is valid. Choose another run.name for a new run."
        )
    return None


def _unfit(data: bytes, step: int, path: Path, differs: Callable[[dict[str, Any], Path], str]) -> str:
    """Why a run cannot resume from these bytes, as the end of a sentence; empty if it can."""
    try:
        state = checkpoint.decode(data, str(path))
        difference = differs(state, path)
    except CheckpointError as error:
        return f"cannot be used: {error}"
    if not difference and state["step"] != step:
        return f"holds step {state['step']}, unlike its name."
    return difference


def _set_aside(path: Path) -> Path:
    for file in (checkpoint.digest_path(path), path):
        file.rename(file.with_name(file.name + ".other"))
    return path.with_name(path.name + ".other")


def config_of(text: str, origin: str) -> Config:
    """The configuration that a checkpoint holds as YAML.

    Raises:
        CheckpointError: this version cannot read it.
    """
    try:
        return from_tree(yaml.safe_load(text), origin)
    except (UserError, yaml.YAMLError, SystemExit) as error:
        raise CheckpointError(f"{origin} has a configuration that this version cannot use: {error}") from None


def _difference(config: Config, state: dict[str, Any], path: Path) -> str:
    """How the checkpoint's decisive settings differ from `config`, as the end of a sentence; empty if they do not."""
    old, new = asdict(config_of(state["config"], str(path))), asdict(config)
    keys = [(s, k) for s in _DECISIVE for k in new[s]] + [(s, k) for s, names in _DECISIVE_KEYS.items() for k in names]
    changed = [f"\n  {s}.{k} was {old[s][k]}, is now {new[s][k]}" for s, k in keys if old[s][k] != new[s][k]]
    return "is of a run with other settings, so resuming would give neither run:" + "".join(changed) if changed else ""
