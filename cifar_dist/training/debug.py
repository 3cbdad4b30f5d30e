"""The checks of the debug mode, before training: shapes, parameters, and overfitting one batch."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.config import Config
from cifar_dist.data import augment
from cifar_dist.errors import UserError
from cifar_dist.models.layers import num_parameters
from cifar_dist.models.network import without_auxiliary
from cifar_dist.training.train_step import TrainStep
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
    size, train_step = config.train.micro_batch_size, trainer.train_step
    batch = next(iter(trainer.loader.read(trainer.order.epoch(0)[:size], size)))
    images = augment.normalize(batch.images, train_step.precision.inputs)
    if config.debug.inspect:
        model = train_step.model
        log(f"one batch:\n{_table({**batch._asdict(), 'normalised': images})}")
        log(f"{num_parameters(model):,} parameters:\n{_table(dict(model.named_parameters()))}")
    if config.debug.overfit_steps:
        log(_overfit(train_step, images, batch.labels, config.debug.overfit_steps))


def _table(tensors: Mapping[str, Tensor]) -> str:
    """A line per tensor: name, shape, dtype, number of values, device, the least and the greatest value."""
    width = max(map(len, tensors))
    return "\n".join(
        f"  {name:<{width}}  {tuple(t.shape)!s:<18} {str(t.dtype).removeprefix('torch.'):<8} {t.numel():>10,}  "
        f"{t.device}  from {t.min().item():.3g} to {t.max().item():.3g}"
        for name, t in tensors.items()
    )


def _overfit(train_step: TrainStep, images: Tensor, labels: Tensor, max_steps: int) -> str:
    """Fit a copy of the model to one batch, and say how well and how fast that went."""
    model, precision = copy.deepcopy(without_auxiliary(train_step.model)).train(), train_step.precision
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accuracy = 0.0  # in training mode
    for step in range(1, max_steps + 1):
        with precision.autocast():
            logits = model(images)
        logits = logits.to(precision.parameters)
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        if accuracy > _TARGET:
            return f"self-check: one batch of {len(images)} images fitted to {accuracy:.1%} in {step} steps"
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, labels))
        optimizer.step()
    raise UserError(
        f"self-check failed: after {max_steps} steps on one batch of {len(images)} images only {accuracy:.1%} of them "
        f"are classified correctly, not over {_TARGET:.0%}. The model, the loss or the data is wrong."
    )
