"""What is left of a run in numbers: summary.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cifar_dist import bundled
from cifar_dist.config import Config
from cifar_dist.distributed import World
from cifar_dist.models.layers import num_parameters
from cifar_dist.training.checkpoint import sha256_of_parameters
from cifar_dist.training.evaluation import Score
from cifar_dist.training.trainer import Trainer


def device_names(world: World) -> list[str]:
    """The name of each rank's device, in the order of ranks; a collective."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor()
    if world.size == 1:
        return [name]
    width = 96
    mine = torch.tensor(list(name.encode()[:width].ljust(width, b" ")), dtype=torch.uint8)
    all_names = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(all_names, mine)
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in all_names]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    names = ("cifar_dist", "torch", "torchvision", "ffcv", "numba", "numpy", "wandb")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a clone, in an environment of the user's own


def git_commit() -> str | None:
    """The commit of the code at work, with -dirty after changes; None outside a git checkout or a bundle."""
    here = Path(__file__).parent
    # First, since a bundle may lie inside some checkout.
    bundle = bundled.commit(here.parents[1])
    if bundle is not None:
        return bundle
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def summarize(config: Config, trainer: Trainer, test: Score, devices: list[str]) -> dict[str, Any]:
    """All figures of a finished run; accuracies are shares of 1, `*_n` how many samples they are over."""
    order, schedule = trainer.order, trainer.schedule
    images = schedule.total_steps * config.train.batch_size
    stepper, progress = trainer.stepper, trainer.progress
    validation = progress.last_validation
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "git_commit": git_commit(),
        "versions": versions(),
        "device_names": devices,
        "world_size": trainer.world.size,
        "num_nodes": trainer.world.num_nodes,
        "model": config.model.name,
        "params": num_parameters(stepper.scored_model),
        "seed": config.run.seed,
        "steps": schedule.total_steps,
        "epochs": schedule.total_steps / order.steps_per_epoch,
        "batch_size": config.train.batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": stepper.accumulation,
        "precision": stepper.number_format.name,
        "train_n": len(order.samples),
        "samples_dropped_per_epoch": order.dropped_per_epoch,
        "train_seconds": progress.train_seconds,
        "images_per_second": images / progress.train_seconds,
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
        "model_sha256": sha256_of_parameters(stepper.model),
    }


def to_json(values: dict[str, Any]) -> str:
    """Strict JSON, one key a line, nested values on one line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
