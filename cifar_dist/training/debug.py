"""The checks of the debug mode, before training: shapes, parameters, and overfitting one batch."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.config import Config
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch
from cifar_dist.errors import UserError
from cifar_dist.models.network import without_auxiliary
from cifar_dist.training.precision import Precision
from cifar_dist.training.trainer import Trainer

_TARGET = 0.95


def check(config: Config, trainer: Trainer, log: Callable[[str], None]) -> None:
    """Do what the section `debug` asks for. The state of the run does not change.

    Raises:
        UserError: the model cannot fit one micro-batch, so model, loss or data are wrong.
    """
    torch.autograd.set_detect_anomaly(config.debug.anomaly, check_nan=True)
    if not (config.debug.inspect or config.debug.overfit_steps):
        return
    size = config.train.micro_batch_size
    batch = next(iter(trainer.loader.read(trainer.order.epoch(0)[:size], size)))
    images = augment.normalize(batch.images, trainer.train_step.precision.inputs)
    if config.debug.inspect:
        log(_describe_batch(batch, images))
        log(parameter_table(trainer.train_step.model))
    if config.debug.overfit_steps:
        accuracy, steps = _overfit(
            trainer.train_step.model, images, batch, trainer.train_step.precision, config.debug.overfit_steps
        )
        if accuracy <= _TARGET:
            raise UserError(
                f"self-check failed: after {steps} steps on one batch of {size} images only {accuracy:.1%} of them are "
                f"classified correctly, not over {_TARGET:.0%}. The model, the loss or the data is wrong."
            )
        log(f"self-check: one batch of {size} images fitted to {accuracy:.1%} in {steps} steps")


def _describe_batch(batch: Batch, images: torch.Tensor) -> str:
    tensors = {**batch._asdict(), "normalised": images}
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
    model: nn.Module, images: torch.Tensor, batch: Batch, precision: Precision, max_steps: int
) -> tuple[float, int]:
    """Fit a copy of `model` to one batch. Returns its accuracy in training mode, and the number of steps."""
    model = copy.deepcopy(without_auxiliary(model)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accuracy, step = 0.0, 0
    for step in range(1, max_steps + 1):  # noqa: B007 - the last value is returned
        with precision.autocast():
            logits = model(images)
        logits = logits.to(precision.parameters)
        accuracy = (logits.argmax(dim=1) == batch.labels).double().mean().item()
        if accuracy > _TARGET:
            break
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, batch.labels))
        optimizer.step()
    return accuracy, step
