"""Optimizer, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cifar_dist.config import LR_BATCH_SIZE, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """Fused SGD with Nesterov momentum; weight decay on what has two or more dimensions (filters, matrices)."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=True, fused=True)
    for parameter in model.parameters():
        # When the first step is skipped, as fp16's scaler may do, fused SGD leaves new buffers uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(step: int, total_steps: int, batch_size: int, config: OptimConfig) -> float:
    """The rate of `step` (from 0): linear warm-up to the peak, then linear or cosine to zero after the last.

    The warm-up has `warmup_share` of all steps to reach the peak, but never rises faster than in `warmup_min_steps`;
    a short run then turns to the decay before it is at the peak.
    """
    peak = config.lr * batch_size / LR_BATCH_SIZE
    share = round(config.warmup_share * total_steps)
    rise = peak * (step + 1) / max(1, share, config.warmup_min_steps)
    progress = max(0.0, (step - share) / max(1, total_steps - share))
    fall = peak * ((1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress)
    return min(rise, fall)


class Ema(AveragedModel):
    """A copy of a model whose parameters follow those of the original: decay x own + (1 - decay) x theirs.

    The first update copies. Torch's own update waits for a GPU at every step; this one never does.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        # The counter stays on the CPU, so that looking at it costs nothing.
        torch._foreach_lerp_(mine, theirs, 1 - self._decay if self.n_averaged > 0 else 1.0)
        self.n_averaged += 1


def build_ema(model: nn.Module, config: OptimConfig) -> Ema | None:
    """The moving average of `model`, or None when `optim.ema_decay` is none."""
    return None if config.ema_decay is None else Ema(model, config.ema_decay)
