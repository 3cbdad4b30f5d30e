"""What a run must not go on with, nor save: numbers that are not finite, ranks that do not hold the same model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cifar_dist.distributed import World
from cifar_dist.errors import NonFiniteError, UserError, shared
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.stepper import Stepper


def nonfinite_loss(metrics: Metrics, world: World, last_saved: int | None) -> UserError:
    """The error for a loss that was infinite or NaN on some rank; call on every rank."""
    step, ranks = metrics.first_nonfinite()
    if world.size == 1:
        where = ""
    elif len(ranks) == world.size:
        where = f" on all {world.size} ranks"
    else:
        where = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {world.size}"
    return _nonfinite(f"the loss became infinite or NaN in step {step}{where}; nothing was saved since.", last_saved)


def refuse_nonfinite(model: nn.Module, step: int, last_saved: int | None) -> None:
    """Wait for the device and look at all parameters.

    Raises:
        NonFiniteError: one is not finite after `step`.
    """
    named = dict(model.named_parameters())
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in named.values()])
    if not bool(finite.all()):
        first = list(named)[int((~finite).nonzero()[0])]
        what = f"a parameter ({first}) is infinite or NaN after step {step}, so it is not saved."
        raise _nonfinite(what, last_saved)


def _nonfinite(what: str, last_saved: int | None) -> UserError:
    good = "There is no good checkpoint yet"
    if last_saved is not None:
        good = f"The last good checkpoint is that of step {last_saved}"
    advice = "Lower optim.lr, set optim.grad_clip, or see where it starts with --debug.anomaly True."
    return shared(NonFiniteError(f"{what} {good}. {advice}"))


def tensors_alike(stepper: Stepper) -> dict[str, Tensor]:
    """By name, all tensors of a run that are the same on every rank: model, moving average, momentum."""
    found = dict(stepper.model.state_dict())
    if stepper.ema is not None:
        found |= {f"moving average of {name}": tensor for name, tensor in stepper.ema.module.state_dict().items()}
    for name, parameter in stepper.model.named_parameters():
        for key, value in stepper.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{key} of {name}"] = value
    return found
