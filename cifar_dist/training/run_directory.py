"""The run directory: its path, and the checkpoint to resume from. Used on rank 0 only."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import from_tree
from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.training import checkpoint

# Settings that define a run. The others (devices, speed, evaluation, tracking) may change in a resumed run.
_FIXED_SECTIONS = ("model", "optim", "augment")
_FIXED_SETTINGS = {
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
    return _unused(Path("runs") / f"{config.model.name}-seed{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}")


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 and so on, that does not exist."""
    others = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(free for free in itertools.chain([path], others) if not free.exists())


@contextmanager
def explain_unwritable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run directory {directory} cannot be written: {error.strerror}. Choose another --run.dir."
        ) from None


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


def find_start(config: Config, directory: Path, log: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The checkpoint to resume from, with its bytes; None to start at step 0. `log` gets a line per skipped file.

    Raises:
        CheckpointError: it is damaged, or of a run with other settings.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return newest_valid(directory / "checkpoints", log, config)
    path = Path(config.run.resume)
    data = checkpoint.read_verified(path, need_digest=False)
    difference = _difference(config, checkpoint.decode(data, str(path)), path)
    if difference:
        raise CheckpointError(f"{path} {difference}\n{_HOW_TO_CONTINUE}")
    return path, data


def newest_valid(
    directory: Path, log: Callable[[str], None], config: Config | None = None
) -> tuple[Path, bytes] | None:
    """The newest checkpoint that is valid and belongs to this run, with its bytes; None if there are no checkpoints.

    Newer valid checkpoints of other runs are renamed, so that checkpoint.retain does not remove them.

    Args:
        log: gets a line about each skipped checkpoint.
        config: of this run; None accepts the checkpoints of any run.

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
            log(f"warning: skipped: {error}")
            continue
        reason = _why_unfit(data, step, path, config)
        if not reason:
            for other, why in others:
                log(f"warning: skipped, and renamed to {_set_aside(other).name}: {other} {why}")
            return path, data
        others.append((path, reason))
    if others:
        raise CheckpointError(f"{others[0][0]} {others[0][1]}\n{_HOW_TO_CONTINUE}")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {directory} is valid; see the warnings above. "
            f"Restore one with its .sha256, or choose another --run.name for a new run."
        )
    return None


def _why_unfit(data: bytes, step: int, path: Path, config: Config | None) -> str:
    """Why a run cannot resume from these bytes, as the end of a sentence; empty if it can."""
    try:
        state = checkpoint.decode(data, str(path))
        difference = _difference(config, state, path) if config else ""
    except CheckpointError as error:
        return f"cannot be used: {error}"
    if not difference and state["step"] != step:
        return f"holds step {state['step']}, unlike its name."
    return difference


def _set_aside(path: Path) -> Path:
    target = _unused(path.with_name(f"{path.name}.other"))
    for file in (checkpoint.digest_path(path), path):
        file.rename(file.with_name(file.name + target.name.removeprefix(path.name)))
    return target


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
    """How the checkpoint's fixed settings differ from `config`, as the end of a sentence; empty if they do not."""
    old, new = asdict(config_of(state["config"], str(path))), asdict(config)
    fixed = {**{section: tuple(new[section]) for section in _FIXED_SECTIONS}, **_FIXED_SETTINGS}
    keys = [(section, key) for section, names in fixed.items() for key in names]
    changed = [f"\n  {s}.{k} was {old[s][k]}, is now {new[s][k]}" for s, k in keys if old[s][k] != new[s][k]]
    return "is of a run with other settings, so resuming would mix the two:" + "".join(changed) if changed else ""
