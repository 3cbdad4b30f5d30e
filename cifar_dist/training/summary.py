"""summary.json: the results of a finished run, and everything that is needed to repeat it."""

import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist import __version__
from cifar_dist.cli import command_line
from cifar_dist.config import Config
from cifar_dist.environment import num_processors
from cifar_dist.files import sha256_of_file
from cifar_dist.models.layers import num_parameters
from cifar_dist.training.evaluation import Score
from cifar_dist.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = None
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def versions() -> dict[str, str | None]:
    """Of Python, CUDA and the libraries that decide speed and results; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cifar_dist": __version__}
    for name in ("torch", "torchvision", "ffcv", "numba", "numpy", "wandb"):
        found[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"cuda": torch.version.cuda}


class GitState(NamedTuple):
    """The state of this code in git; None: unknown."""

    commit: str | None
    """With -dirty if a tracked file of the project is changed, or a file of the package is not tracked."""
    diff_sha256: str | None
    """SHA-256 over lines like sha256sum's, sorted by name, of the files in cifar_dist/ that differ from the commit:
    changed, removed (with - as digest), not tracked and not ignored. None: there are none."""


def git_commit() -> str | None:
    """The commit of this code, see `GitState`; that of a bundle for a bundle; None outside of both."""
    return git_state().commit


@functools.cache  # later calls get the state at the first one, since code may change while a run takes hours
def git_state(root: Path = ROOT) -> GitState:
    """The state of the project in `root`, if that is the top level of a git checkout which tracks this file."""
    bundle = bundle_commit(root)
    if bundle is not None:  # before asking git: a bundle may lie inside another checkout
        return GitState(bundle, None)
    package, own = root / "cifar_dist", Path(__file__).resolve().relative_to(ROOT)
    top, commit = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "--verify", "HEAD")
    tracked = _git(root, "ls-files", "--error-unmatch", "-z", "--", str(own))
    changed = _git(root, "diff", "--name-only", "--no-renames", "--no-relative", "-z", "HEAD", "--")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", package.name)
    if top != f"{root.resolve()}\n" or None in (commit, tracked, changed, untracked):
        return GitState(None, None)
    names = {name for name in f"{changed}{untracked}".split("\0") if name}
    ours = sorted(name for name in names if name.startswith(f"{package.name}/"))
    lines = "".join(f"{_sha256(root / name)}  {name}\n" for name in ours)
    digest = hashlib.sha256(os.fsencode(lines)).hexdigest() if ours else None
    return GitState(f"{commit}".strip() + "-dirty" * bool(names), digest)


def _git(root: Path, *arguments: str) -> str | None:
    """The output of git for the checkout around `root`, whatever checkout a hook's variables name; None: it failed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}
    kept.pop("GIT_CONFIG_PARAMETERS", None)  # of git -c
    command = ["git", "-C", str(root), *arguments]
    environment = kept | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(command, capture_output=True, env=environment, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(result.stdout)


def _sha256(path: Path) -> str:
    return sha256_of_file(path) if path.is_file() else "-"


def bundle_commit(folder: Path) -> str | None:
    """The commit of the bundle (see offline.bundle) in `folder`, with -dirty after changes; None: it is no bundle."""
    try:
        commit = (folder / "COMMIT").read_text(encoding="utf-8").strip()
        sums = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    code = [line.split("  ", 1) for line in sums if "  cifar_dist/" in line]
    unchanged = all((folder / name).is_file() and sha256_of_file(folder / name) == digest for digest, name in code)
    return commit if unchanged or commit.endswith("-dirty") else f"{commit}-dirty"


def summarize(config: Config, trainer: Trainer, test: Score, devices: list[str]) -> dict[str, Any]:
    """Values of summary.json. Accuracies are fractions; `*_n` are the numbers of samples that they are over."""
    order, schedule = trainer.order, trainer.schedule
    train_step, progress = trainer.train_step, trainer.progress
    validation = progress.last_validation
    return {
        "command": command_line(),
        "git_commit": git_commit(),
        "git_diff_sha256": git_state().diff_sha256,
        "versions": versions(),
        "device_names": devices,
        "world_size": trainer.world.size,
        "num_nodes": trainer.world.num_nodes,
        "model": config.model.name,
        "params": num_parameters(train_step.scored_model),
        "seed": config.run.seed,
        "steps": schedule.total_steps,
        "epochs": schedule.total_steps / order.steps_per_epoch,
        "batch_size": config.train.batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": train_step.accumulation,
        "precision": train_step.precision.name,
        "train_n": len(order.samples),
        "samples_dropped_per_epoch": order.dropped_per_epoch,
        "train_seconds": progress.train_seconds,
        "images_per_second": schedule.total_steps * config.train.batch_size / progress.train_seconds,
        "first_step_seconds": progress.first_step_seconds,
        "startup_seconds": progress.startup_seconds,
        "val_accuracy": validation["val/accuracy"] if validation else None,
        "val_n": int(validation["val/n"]) if validation else None,
        "best_val_accuracy": progress.best_accuracy if progress.best_step is not None else None,
        "test_accuracy": test.accuracy,
        "test_accuracy_tta": test.accuracy_tta,
        "test_n": test.n,
        "test_loss": test.loss if math.isfinite(test.loss) else None,
        "test_class_accuracy": test.class_accuracy,
        "test_confusion": test.confusion,
        "data_receipt": trainer.metrics.receipt.digests(),
        "weights_sha256": progress.weights_sha256,
        "model_sha256": sha256_of_parameters(train_step.model),
    }


def describe(config: Config, trainer: Trainer, devices: list[str], directory: Path) -> str:
    """What a run prints first: network, devices, batches and steps."""
    git_state()  # now, for summary.json at the end
    order, schedule, train_step = trainer.order, trainer.schedule, trainer.train_step
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    if trainer.world.device.type == "cpu":
        used, available = trainer.world.local_size * config.train.threads, num_processors()
        kinds += f" ({used} of {available} processors per node, see train.threads)" if used < available else ""
    return (
        f"{config.model.title}: "
        f"{num_parameters(train_step.scored_model):,} parameters, {train_step.precision.name}, on {kinds}\n"
        f"{len(order.samples):,} training samples in {schedule.steps_per_epoch} steps of {config.train.batch_size} "
        f"({config.train.micro_batch_size} x {trainer.world.size} x {train_step.accumulation} accumulated); "
        f"{order.dropped_per_epoch} samples dropped per epoch\n"
        f"steps {trainer.progress.step} to {schedule.total_steps}; run directory {directory}"
    )


def sha256_of_parameters(model: nn.Module) -> str:
    """Of all parameters in state-dict order, see `sha256_of_tensors`."""
    return sha256_of_tensors(model.parameters())


def sha256_of_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of `tensors`, each in its logical (NCHW) order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
