"""summary.json: the results of a finished run, and everything that is needed to repeat it."""

import hashlib
import importlib.metadata
import math
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_dist.cli import command_line
from cifar_dist.config import Config
from cifar_dist.environment import num_processors
from cifar_dist.files import sha256_of_file
from cifar_dist.models.layers import num_parameters
from cifar_dist.training.evaluation import Score
from cifar_dist.training.trainer import Trainer


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
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("cifar_dist", "torch", "torchvision", "ffcv", "numba", "numpy", "wandb"):
        found[name] = None  # of cifar_dist in a clone
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"cuda": torch.version.cuda}


def git_commit() -> str | None:
    """The commit of this code, with -dirty after changes; None outside a git checkout and a bundle."""
    here = Path(__file__).parent
    bundle = bundle_commit(here.parents[1])
    if bundle is not None:  # before asking git: a bundle may lie inside another checkout
        return bundle
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


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
        "model_sha256": sha256_of_parameters(train_step.model),
    }


def describe(config: Config, trainer: Trainer, devices: list[str], directory: Path) -> str:
    """What a run prints first: network, devices, batches and steps."""
    order, schedule, train_step = trainer.order, trainer.schedule, trainer.train_step
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    if trainer.world.device.type == "cpu":
        used, available = trainer.world.local_size * config.train.threads, num_processors()
        kinds += f" ({used} of {available} processors per node, see train.threads)" if used < available else ""
    return (
        f"{config.model.name} ({config.model.stem} stem, width {config.model.width:g}), "
        f"{num_parameters(train_step.scored_model):,} parameters, {train_step.precision.name}, on {kinds}\n"
        f"{len(order.samples):,} training samples in {schedule.steps_per_epoch} steps of {config.train.batch_size} "
        f"({config.train.micro_batch_size} x {trainer.world.size} x {train_step.accumulation} accumulated); "
        f"{order.dropped_per_epoch} samples dropped per epoch\n"
        f"steps {trainer.progress.step} to {schedule.total_steps}; run directory {directory}"
    )


def sha256_of_parameters(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters in state-dict order, each in its logical (NCHW) order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
