"""Scores a checkpoint outside its run: the work of `python -m cifar_dist.evaluate`."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cifar_dist.config import NUM_TEST, ModelConfig
from cifar_dist.data.dataset import prepared_folder, read_split
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World, broadcast_bytes, run_and_sync_errors
from cifar_dist.errors import UserError
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import main_weights, without_auxiliary
from cifar_dist.training import checkpoint
from cifar_dist.training.evaluation import Evaluator, bn_samples
from cifar_dist.training.optim import Ema
from cifar_dist.training.precision import choose_precision, set_backends
from cifar_dist.training.run_directory import config_of


def score_checkpoint(path: Path, world: World, split: str, data_dir: Path | None) -> dict[str, Any]:
    """Score the model in the file `path` on all ranks. Returns the figures, the same on every rank.

    Batch-norm statistics are computed anew from training images, as at the end of training, so checkpoints from the
    middle of a run are scored in the same way. `split` is test or validation.

    Raises:
        UserError: the checkpoint, the data or the split cannot be used.
    """
    data = run_and_sync_errors(world, lambda: checkpoint.read_verified(path, need_digest=False), only_if=world.is_main)
    data = broadcast_bytes(data or b"", world)
    state = run_and_sync_errors(world, lambda: checkpoint.decode(data, str(path)))
    config = run_and_sync_errors(world, lambda: config_of(state["config"], str(path)))
    if split == "validation" and config.data.train_on == "all":
        text = f"{path} was trained on all 50,000 images (data.train_on all): no validation split."
        raise UserError(text, printed_elsewhere=True)
    log = partial(print, file=sys.stderr, flush=True)  # stdout is for the result
    folder = prepared_folder(replace(config.data, dir=data_dir or config.data.dir, stage_dir=None), world, log)
    samples = read_split(config.data, folder, world)
    precision = run_and_sync_errors(world, lambda: choose_precision(config.train.precision, world.device))
    set_backends(config.train, config.run.deterministic, world.device)
    # Auxiliary heads only help training.
    model = run_and_sync_errors(world, lambda: _network(config.model, str(path))).to(world.device, precision.parameters)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = None if config.optim.ema_decay is None else Ema(model, config.optim.ema_decay)
    target, weights = (model, main_weights(state["model"])) if ema is None else (ema, state["ema"])
    run_and_sync_errors(world, lambda: checkpoint.load_weights(target, weights, str(path)))
    evaluator = Evaluator(model if ema is None else ema.module, config.eval, precision, world)
    name, scored = ("test.beton", np.arange(NUM_TEST)) if split == "test" else ("train.beton", samples.validation)
    with BetonLoader(folder / "train.beton", world.device) as loader, loader.for_file(folder / name) as images:
        evaluator.recalibrate(loader, bn_samples(samples, config.eval))
        result = evaluator.score(images, scored, config.eval.tta)
    return {
        "checkpoint": str(path),
        "step": state["step"],
        "split": split,
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


def _network(config: ModelConfig, origin: str) -> nn.Module:
    """The network of a checkpoint, without auxiliary heads.

    Raises:
        UserError: it is an own network that cannot be imported or used.
    """
    try:
        return without_auxiliary(create_model(replace(config, auxiliary=False)))
    except UserError as error:
        raise UserError(f"{origin} needs its network: {error}") from None
