"""Optimizer, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import LR_BATCH_SIZE, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """Fused SGD with Nesterov momentum; weight decay on what has two or more dimensions (filters, matrices)."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=True, fused=True)


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


def build_ema(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    """A copy of `model` that follows its weights, or None when `optim.ema_decay` is none."""
    if config.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
