"""The directory of a run: whose it is, where to go on from, and that one job at a time is in it.

Everything here runs on rank 0 alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from cifar_dist.cli import from_tree, to_yaml
from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, RunInUseError, UserError
from cifar_dist.files import write_text_atomic
from cifar_dist.training import checkpoint

# What decides which numbers a run computes. The rest may change when it goes on.
_DECISIVE = ("model", "optim", "augment")
_DECISIVE_KEYS = {
    "run": ("seed",),
    "data": ("subset", "train_on"),
    "train": ("epochs", "max_steps", "batch_size", "micro_batch_size", "precision"),
}


@contextmanager
def claimed(config: Config) -> Iterator[Path]:
    """Make the run's directory and hold it until the end; the kernel lets go of it when this process dies.

    Raises:
        RunInUseError: another job is in it.
        UserError: it holds a run already and `run.resume` does not allow for that, or it cannot be written.
    """
    directory = directory_of(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunInUseError(
            f"the run directory {directory} is in use by {_owner(directory)}. Wait for that job or stop it, or choose "
            f"another --run.name."
        ) from None
    except NotImplementedError:  # older filelock, where the file system knows no flock
        raise UserError(
            f"the run directory {directory} is on a file system without locks. Choose another --run.dir."
        ) from None
    except OSError as error:
        raise UserError(
            f"the run directory {directory} cannot be written: {error.strerror}. Choose another --run.dir."
        ) from None
    try:
        if config.run.resume != "auto" and holds_run(directory):
            raise UserError(
                f"the run directory {directory} already holds a run. Go on with it by --run.resume auto, or choose "
                f"another --run.name."
            )
        for left in directory.glob(".*.tmp"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        write_text_atomic(directory / ".owner", json.dumps(owner))
        try:
            yield directory
        finally:
            (directory / ".owner").unlink(missing_ok=True)
    finally:
        lock.release()


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


def _owner(directory: Path) -> str:
    try:
        owner = json.loads((directory / ".owner").read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}" + (f" (job {owner['job']})" if owner["job"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def starting_point(config: Config, directory: Path, warn: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The checkpoint to go on from, with its bytes, or None to start at step 0.

    Raises:
        CheckpointError: it is damaged, or of a run that computes something else.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        found = checkpoint.newest_valid(directory / "checkpoints", warn)
        if found is None:
            return None
        path, data = found
    else:
        path = Path(config.run.resume)
        data = checkpoint.read_verified(path, need_digest=False)
    _refuse_other_run(config, checkpoint.decode(data, str(path))["config"], path)
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


def _refuse_other_run(config: Config, text: str, path: Path) -> None:
    old, new = asdict(config_of(text, str(path))), asdict(config)
    keys = [(s, k) for s in _DECISIVE for k in new[s]] + [(s, k) for s, names in _DECISIVE_KEYS.items() for k in names]
    changed = [f"{s}.{k} was {old[s][k]}, is now {new[s][k]}" for s, k in keys if old[s][k] != new[s][k]]
    if changed:
        raise CheckpointError(
            f"{path} is of a run with other settings, so going on would give neither run:\n  "
            + "\n  ".join(changed)
            + "\nGive the old values, or start anew under another --run.name without --run.resume."
        )


def write_config(config: Config, directory: Path) -> None:
    write_text_atomic(directory / "config.yaml", to_yaml(config))
