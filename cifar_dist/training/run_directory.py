"""The directory of a run: whose it is, where to go on from, and that one job at a time is in it.

Everything here runs on rank 0 alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import from_tree, to_yaml
from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.files import write_text_atomic
from cifar_dist.training import checkpoint
from cifar_dist.training.claim import Claim
from cifar_dist.training.takeover import acquire

# What decides which numbers a run computes. The rest may change when it goes on.
_DECISIVE = ("model", "optim", "augment")
_DECISIVE_KEYS = {
    "run": ("seed",),
    "data": ("subset", "train_on"),
    "train": ("epochs", "max_steps", "batch_size", "micro_batch_size", "precision"),
}


@contextmanager
def claimed(config: Config, say: Callable[[str], None]) -> Iterator[Claim]:
    """Make the run's directory and own it until the end. See `takeover` for what becomes of a former owner.

    Raises:
        RunInUseError: another job is in it.
        UserError: it holds a run already and `run.resume` does not allow for that, or it cannot be written.
    """
    directory = directory_of(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        claim = acquire(directory, config.run.resume == "auto", say)
    except OSError as error:
        raise UserError(
            f"the run directory {directory} cannot be written: {error.strerror}. Choose another --run.dir."
        ) from None
    try:
        claim.check()
        if config.run.resume != "auto" and holds_run(directory):
            raise UserError(
                f"the run directory {directory} already holds a run. Go on with it by --run.resume auto, or choose "
                f"another --run.name."
            )
        for left in directory.glob(".*.tmp"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        yield claim
    finally:
        claim.release()


def directory_of(config: Config) -> Path:
    """The directory that a run with `config` gets, if it starts now."""
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


def holds_run(directory: Path) -> bool:
    """Whether a run was begun there."""
    return (directory / "config.yaml").exists() or bool(checkpoint.all_steps(directory / "checkpoints"))


def starting_point(config: Config, directory: Path, warn: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The checkpoint to go on from, with its bytes, or None to start at step 0.

    Raises:
        CheckpointError: it is damaged, or of a run that computes something else.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return checkpoint.newest_valid(directory / "checkpoints", warn, partial(_difference, config))
    path = Path(config.run.resume)
    data = checkpoint.read_verified(path, need_digest=False)
    difference = _difference(config, checkpoint.decode(data, str(path)), path)
    if difference:
        raise CheckpointError(f"{path} {difference}\n{checkpoint.HOW_TO_GO_ON}")
    return path, data


def config_of(text: str, origin: str) -> Config:
    """The configuration that a checkpoint carries as YAML.

    Raises:
        CheckpointError: it is no configuration of this version.
    """
    try:
        return from_tree(yaml.safe_load(text), origin)
    except (UserError, yaml.YAMLError, SystemExit) as error:
        raise CheckpointError(f"{origin} has a configuration that this version cannot use: {error}") from None


def _difference(config: Config, state: dict[str, Any], path: Path) -> str:
    """In what the checkpoint is another run's, as the end of a sentence; empty if in nothing that decides."""
    old, new = asdict(config_of(state["config"], str(path))), asdict(config)
    keys = [(s, k) for s in _DECISIVE for k in new[s]] + [(s, k) for s, names in _DECISIVE_KEYS.items() for k in names]
    changed = [f"\n  {s}.{k} was {old[s][k]}, is now {new[s][k]}" for s, k in keys if old[s][k] != new[s][k]]
    return "is of a run with other settings, so going on would give neither run:" + "".join(changed) if changed else ""


def write_config(config: Config, directory: Path) -> None:
    write_text_atomic(directory / "config.yaml", to_yaml(config))
