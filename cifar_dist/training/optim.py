"""Optimizer, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cifar_dist.config import LR_BATCH_SIZE, OptimConfig
from cifar_dist.training.muon import MuonSGD


def fix_norm_scales(model: nn.Module) -> None:
    """Keep the scales of all batch norms as they are; before anything asks which parameters are trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.requires_grad_(False)


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int, muon_dtype: torch.dtype = torch.float32
) -> torch.optim.SGD:
    """Fused SGD with Nesterov momentum; weight decay on what has two or more dimensions (filters, matrices).

    With `optim.name` muon, filters are a group of their own, without weight decay; Muon iterates in `muon_dtype`.
    Each group's `peak_lr` is its learning rate at the peak.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = config.name == "muon"
    filters = [p for p in trained.values() if muon and p.ndim == 4]
    decayed = [p for p in trained.values() if p.ndim >= 2 and not (muon and p.ndim == 4)]
    biases = [p for name, p in trained.items() if p.ndim < 2 and name.endswith("bias")]
    scales = [p for name, p in trained.items() if p.ndim < 2 and not name.endswith("bias")]
    peak = config.lr * batch_size / LR_BATCH_SIZE
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak_lr": peak},
        {"params": scales, "weight_decay": 0.0, "peak_lr": peak},
        {"params": biases, "weight_decay": 0.0, "peak_lr": peak * config.bias_lr_factor},
    ]
    defaults: dict[str, Any] = {"lr": 0.0, "momentum": config.momentum, "nesterov": True, "fused": True}
    optimizer: torch.optim.SGD
    if muon:
        # SGD's own momentum is off where Muon has had its: it then only subtracts.
        off = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        groups.append({"params": filters, "peak_lr": config.muon_lr, "muon_momentum": config.muon_momentum, **off})
        optimizer = MuonSGD(groups, muon_dtype, **defaults)
    else:
        optimizer = torch.optim.SGD(groups, **defaults)
    for parameter in trained.values():
        # When the first step is skipped, as fp16's scaler may do, fused SGD leaves new buffers uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def schedule(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of `step` (from 0) as a share of its peak: linear warm-up, then linear or cosine to zero after
    the last step.

    The warm-up has `warmup_share` of all steps to reach the peak, but never rises faster than in `warmup_min_steps`;
    a short run then turns to the decay before it is at the peak.
    """
    share = round(config.warmup_share * total_steps)
    rise = (step + 1) / max(1, share, config.warmup_min_steps)
    progress = max(0.0, (step - share) / max(1, total_steps - share))
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return min(1.0, rise, fall)


class Ema(AveragedModel):
    """A copy of a model whose parameters follow those of the original: d x own + (1 - d) x theirs.

    d rises to `decay`: it is at most (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    Torch's own update waits for a GPU at every step; this one never does.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        n = int(self.n_averaged)  # it stays on the CPU, so that looking at it costs nothing
        torch._foreach_lerp_(mine, theirs, 1 - min(self._decay, (1 + n) / (10 + n)))
        self.n_averaged += 1


def build_ema(model: nn.Module, config: OptimConfig) -> Ema | None:
    """The moving average of `model`, or None when `optim.ema_decay` is none."""
    return None if config.ema_decay is None else Ema(model, config.ema_decay)
