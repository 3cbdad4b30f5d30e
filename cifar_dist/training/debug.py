"""Checks before training: of own code, and those of the debug mode (shapes, parameters, overfitting one batch)."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist import extension
from cifar_dist.config import Config
from cifar_dist.data import augment
from cifar_dist.errors import UserError
from cifar_dist.models.layers import num_parameters
from cifar_dist.models.network import without_auxiliary
from cifar_dist.training import checkpoint
from cifar_dist.training.schedule import LOW_RESOLUTIONS
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer

_TARGET = 0.95
_MAX_LINES = 30  # of the table of parameters


def check(config: Config, trainer: Trainer, log: Callable[[str], None]) -> None:
    """Try own code, and do what the section `debug` asks for. The state of the run does not change.

    Raises:
        UserError: own code fails, or the model cannot fit one micro-batch, so model, loss or data are wrong.
    """
    if any(name not in built_in for _, name, built_in in extension.names(config)):
        try_own_code(config, trainer.train_step)
    torch.autograd.set_detect_anomaly(config.debug.anomaly, check_nan=True)
    if not (config.debug.inspect or config.debug.overfit_steps):
        return
    size, train_step = config.train.micro_batch_size, trainer.train_step
    batch = next(iter(trainer.loader.read(trainer.order.epoch(0)[:size], size)))
    images = augment.normalize(batch.images, train_step.precision.inputs)
    if config.debug.inspect:
        model = train_step.model
        parts = {**batch._asdict(), "normalised": images}
        log(f"one batch:\n{table({name: [tensor] for name, tensor in parts.items()})}")
        groups = grouped(dict(model.named_parameters()), _MAX_LINES)
        log(f"{num_parameters(model):,} parameters:\n{table(groups)}")
    if config.debug.overfit_steps:
        log(_overfit(train_step, images, batch.labels, config.debug.overfit_steps))


def try_own_code(config: Config, train_step: TrainStep) -> None:
    """Encode a checkpoint, and pass images of each low resolution that training will have.

    Raises:
        UserError: own code fails.
    """
    with extension.explained("a checkpoint of an own network or optimizer (model.name, optim.name)"):
        checkpoint.encode(0, train_step.state())
    extra, device = augment.own_augmentation(config.augment.extra), train_step.world.device
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    for size in LOW_RESOLUTIONS if config.augment.low_resolution_share > 0 else ():
        images = torch.zeros(2, 3, size, size, dtype=train_step.precision.inputs, device=device)
        told = f"own code with images {tuple(images.shape)}, which augment.low_resolution_share 0 would not need,"
        with extension.explained(told), torch.no_grad(), train_step.precision.autocast():
            images = images if extra is None else extra(images, labels.new_zeros(2, extra.num_words))
            F.cross_entropy(without_auxiliary(train_step.model)(images), labels)


def grouped(tensors: Mapping[str, Tensor], most: int) -> dict[str, list[Tensor]]:
    """Tensors by the first parts of their names: as many parts as give at most `most` groups, else one part.

    Of more modules than that the last ones are one group.
    """
    depth = max((name.count(".") + 1 for name in tensors), default=1)
    groups = dict[str, list[Tensor]]()
    for parts in range(depth, 0, -1):
        groups = {}
        for name, tensor in tensors.items():
            groups.setdefault(".".join(name.split(".")[:parts]), []).append(tensor)
        if len(groups) <= most:
            return groups
    kept, others = list(groups.items())[: most - 1], list(groups.items())[most - 1 :]
    return {**dict(kept), f"{len(others)} others": [tensor for _, group in others for tensor in group]}


def table(groups: Mapping[str, list[Tensor]]) -> str:
    """A line per group: shape or number of tensors, dtypes, number of values, device, least and greatest value."""
    lines, width = [], max(map(len, groups))
    for name, group in groups.items():
        shape = str(tuple(group[0].shape)) if len(group) == 1 else f"{len(group)} tensors"
        dtypes = ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in group))
        least, greatest = (pick(getattr(t, pick.__name__)().item() for t in group) for pick in (min, max))
        lines.append(
            f"  {name:<{width}}  {shape:<18} {dtypes:<8} {sum(t.numel() for t in group):>10,}  {group[0].device}  "
            f"from {least:.3g} to {greatest:.3g}"
        )
    return "\n".join(lines)


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
