"""What the debug mode shows and checks before it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.config import Config
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch
from cifar_dist.errors import UserError
from cifar_dist.models.auxiliary import without_auxiliary
from cifar_dist.training.precision import NumberFormat
from cifar_dist.training.trainer import Trainer

_TARGET = 0.95


def check(config: Config, trainer: Trainer, say: Callable[[str], None]) -> None:
    """Do what the section `debug` asks for; the run's state stays as it is.

    Raises:
        UserError: one micro-batch cannot be learned, so model, loss or data are wrong.
    """
    torch.autograd.set_detect_anomaly(config.debug.anomaly, check_nan=True)
    if not (config.debug.inspect or config.debug.overfit_steps):
        return
    size = config.train.micro_batch_size
    batch = next(iter(trainer.loader.read(trainer.order.global_batch(0)[:size], size)))
    images = augment.normalize(batch.images, trainer.stepper.number_format.inputs)
    if config.debug.inspect:
        say(_describe_batch(batch, images))
        say(parameter_table(trainer.stepper.model))
    if config.debug.overfit_steps:
        accuracy, steps = _overfit(
            trainer.stepper.model, images, batch, trainer.stepper.number_format, config.debug.overfit_steps
        )
        if accuracy <= _TARGET:
            raise UserError(
                f"self-check failed: after {steps} steps on one batch of {size} images only {accuracy:.1%} of them are "
                f"recognised, not over {_TARGET:.0%}. Something is wrong with the model, the loss or the data."
            )
        say(f"self-check: one batch of {size} images fitted to {accuracy:.1%} in {steps} steps")


def _describe_batch(batch: Batch, images: torch.Tensor) -> str:
    tensors = {**batch._asdict(), "augmented": images}
    lines = [
        f"  {name:<10} {tuple(t.shape)!s:<20} {str(t.dtype).removeprefix('torch.'):<9} {t.device}  "
        f"from {t.min().item():.3g} to {t.max().item():.3g}"
        for name, t in tensors.items()
    ]
    return "one batch:\n" + "\n".join(lines)


def parameter_table(model: nn.Module) -> str:
    """One line per parameter: name, shape, dtype, count; and the sum."""
    rows = [
        (name, str(tuple(p.shape)), str(p.dtype).removeprefix("torch."), p.numel())
        for name, p in model.named_parameters()
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f"  {name:<{width}}  {shape:<18} {dtype:<8} {n:>10,}" for name, shape, dtype, n in rows]
    total = sum(n for *_, n in rows)
    return "parameters:\n" + "\n".join(lines) + f"\n  {'in all':<{width}}  {'':<18} {'':<8} {total:>10,}"


def _overfit(
    model: nn.Module, images: torch.Tensor, batch: Batch, formats: NumberFormat, max_steps: int
) -> tuple[float, int]:
    """Fit a copy of `model` to one batch; (share recognised in training mode, steps taken)."""
    model = copy.deepcopy(without_auxiliary(model)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accuracy, step = 0.0, 0
    for step in range(1, max_steps + 1):  # noqa: B007 - the last value is returned
        with formats.autocast():
            logits = model(images)
        logits = logits.to(formats.parameters)
        accuracy = (logits.argmax(dim=1) == batch.labels).double().mean().item()
        if accuracy > _TARGET:
            break
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, batch.labels))
        optimizer.step()
    return accuracy, step
