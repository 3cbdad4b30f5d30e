"""Scores a checkpoint outside its run: the work of `python -m cifar_dist.evaluate`."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cifar_dist.config import NUM_TEST, Config, PrecisionName
from cifar_dist.data.dataset import prepared_folder, read_split
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World, broadcast_bytes, broadcast_from_main, run_and_sync_errors
from cifar_dist.errors import UserError
from cifar_dist.training import checkpoint
from cifar_dist.training.evaluation import Evaluator, bn_samples
from cifar_dist.training.precision import common_precision, set_backends
from cifar_dist.training.run_directory import config_of, find_checkpoint
from cifar_dist.training.weights import scored_network


@dataclass(frozen=True)
class Request:
    """What to score; the fields are the options of `python -m cifar_dist.evaluate`."""

    path: Path
    which: str | int = "last"
    split: Literal["test", "validation"] = "test"
    data_dir: Path | None = None
    precision: PrecisionName | None = None
    write_statistics: bool = False


def score_checkpoint(request: Request, world: World) -> dict[str, Any]:
    """Score a checkpoint on all ranks. Returns the figures, the same on every rank.

    Uses the batch-norm statistics in the checkpoint; computes them from training images if it has none.

    Raises:
        UserError: the checkpoint, the data or the split cannot be used.
    """
    path = Path(broadcast_from_main(world, lambda: str(find_checkpoint(request.path, request.which))))
    data = run_and_sync_errors(world, lambda: checkpoint.read_verified(path, need_digest=False), only_if=world.is_main)
    data = broadcast_bytes(data or b"", world)
    state = run_and_sync_errors(world, lambda: checkpoint.decode(data, str(path)))
    config = run_and_sync_errors(world, lambda: config_of(state["config"], str(path)))
    own_name = checkpoint.path_of(path.parent, state["step"])
    if request.write_statistics and path != own_name:
        raise UserError(f"{path} is not named {own_name.name}, as runs name it. Rename it.", printed_elsewhere=True)
    if request.split == "validation" and config.data.train_on == "all":
        text = f"{path} was trained on all 50,000 images (data.train_on all): no validation split."
        raise UserError(text, printed_elsewhere=True)
    log = partial(print, file=sys.stderr, flush=True)  # stdout is for the result
    data_config = replace(config.data, dir=request.data_dir or config.data.dir, stage_dir=None)
    folder = prepared_folder(data_config, world, log)
    samples = read_split(config.data, folder, world)
    precision = common_precision(request.precision or config.train.precision, world, state["precision"])
    if request.write_statistics and precision.name != state["precision"]:
        text = f"--write-statistics computes in {state['precision']}, as the run did. Use a machine that supports it."
        raise UserError(text, printed_elsewhere=True)
    set_backends(config.train, config.run.deterministic, world.device)
    network = run_and_sync_errors(world, lambda: scored_network(state, config, str(path)))
    network.to(world.device, precision.parameters)
    if config.train.channels_last:
        network.to(memory_format=torch.channels_last)
    evaluator = Evaluator(network, config.eval, precision, world)
    test = request.split == "test"
    name, scored = ("test.beton", np.arange(NUM_TEST)) if test else ("train.beton", samples.validation)
    with BetonLoader(folder / "train.beton", world.device) as loader, loader.for_file(folder / name) as images:
        if request.write_statistics or not state["statistics"]:
            if world.is_main:
                log(f"computing batch-norm statistics from {config.eval.bn_samples:,} training images")
            evaluator.recalibrate(loader, bn_samples(samples, config.eval))
        result = evaluator.score(images, scored, config.eval.tta)
    if request.write_statistics:
        new = network.state_dict()
        run_and_sync_errors(world, lambda: _write_again(path, state, config, new, log), only_if=world.is_main)
    return {
        "checkpoint": str(path),
        "step": state["step"],
        "split": request.split,
        "n": result.n,
        "accuracy": result.accuracy,
        "accuracy_tta": result.accuracy_tta,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "class_accuracy": result.class_accuracy,
        "confusion": result.confusion,
        "confusion_tta": result.confusion_tta,
        "precision": precision.name,
        "world_size": world.size,
    }


def _write_again(
    path: Path, state: dict[str, Any], config: Config, scored: dict[str, Tensor], log: Callable[[str], None]
) -> None:
    """Write the checkpoint `path` again, with the statistics in the state dict `scored`."""
    if config.optim.ema_decay is None:
        state["model"] |= scored
    else:
        state["ema"] |= {f"module.{name}": tensor for name, tensor in scored.items()}
    checkpoint.write(path.parent, state["step"], checkpoint.encode(state["step"], state | {"statistics": True}))
    log(f"written with batch-norm statistics: {path}")
