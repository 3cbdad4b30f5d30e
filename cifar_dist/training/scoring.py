"""Score a checkpoint outside its run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_dist.config import NUM_TEST
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World, broadcast_bytes, together
from cifar_dist.errors import UserError, shared
from cifar_dist.files import write_text_atomic
from cifar_dist.models.auxiliary import main_weights
from cifar_dist.models.registry import create_model
from cifar_dist.training import checkpoint, evaluation
from cifar_dist.training.optim import build_ema
from cifar_dist.training.precision import number_format, set_backends
from cifar_dist.training.run_directory import config_of
from cifar_dist.training.samples import folder_of, split_of
from cifar_dist.training.summary import to_json


def score_checkpoint(
    path: Path, world: World, validation: bool, data_dir: Path | None, json_path: Path | None
) -> evaluation.Score:
    """Score the model in the file `path` on all ranks; rank 0 prints the result as JSON.

    Batch-norm statistics are taken anew from training images, as at the end of training, so that checkpoints from
    the middle of a run count alike.

    Raises:
        UserError: the checkpoint, the data or the choice of split cannot be used.
    """

    def say(text: str) -> None:
        if world.speaks:
            print(text, file=sys.stderr, flush=True)  # stdout is the result's

    if json_path and not json_path.parent.is_dir():
        raise shared(UserError(f"--json {json_path}: there is no folder {json_path.parent}."))
    data = together(world, lambda: checkpoint.read_verified(path, need_digest=False), at_work=world.rank == 0)
    data = broadcast_bytes(data or b"", world)
    state = together(world, lambda: checkpoint.decode(data, str(path)))
    config = together(world, lambda: config_of(state["config"], str(path)))
    if validation and config.data.train_on == "all":
        raise shared(UserError(f"{path} was trained on all 50,000 images (data.train_on all): no validation split."))
    folder = data_dir or config.data.dir
    folder_of(folder, None, config.data.source, world, say)
    parts = split_of(config.data, folder, world)
    formats = together(world, lambda: number_format(config.train.precision, world.device))
    set_backends(config.train, config.run.deterministic)
    # The auxiliary heads have served their purpose in training.
    model = create_model(replace(config.model, auxiliary=False)).to(world.device, formats.parameters)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = build_ema(model, config.optim)
    target, weights = (model, main_weights(state["model"])) if ema is None else (ema, state["ema"])
    together(world, lambda: checkpoint.load_weights(target, weights, str(path)))
    scored = model if ema is None else ema.module
    samples = evaluation.calibration_samples(parts, config.eval)
    chunk = config.eval.batch_size
    with BetonLoader(folder / "train.beton", world.device) as loader:
        evaluation.recalibrate(scored, loader, samples, chunk, formats, world)
        if validation:
            result = evaluation.score(scored, loader, parts.validation, chunk, formats, world, config.eval.tta)
        else:
            with loader.of(folder / "test.beton") as test_loader:
                samples = np.arange(NUM_TEST)
                result = evaluation.score(scored, test_loader, samples, chunk, formats, world, config.eval.tta)
    if world.speaks:
        which = "validation" if validation else "test"
        figures = {"checkpoint": str(path), "step": state["step"], "split": which, **_figures(result)}
        figures["world_size"] = world.size
        print(to_json(figures), end="")
        if json_path:
            write_text_atomic(json_path, to_json(figures))
    return result


def _figures(result: evaluation.Score) -> dict[str, Any]:
    return {
        "n": result.n,
        "accuracy": result.accuracy,
        "accuracy_tta": result.accuracy_tta,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "class_accuracy": result.class_accuracy,
        "confusion": result.confusion,
        "confusion_tta": result.confusion_tta,
    }
