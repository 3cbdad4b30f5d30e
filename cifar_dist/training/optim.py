"""Optimizer with its parameter groups, and the moving average of the weights."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cifar_dist import extension
from cifar_dist.config import LR_BATCH_SIZE, OPTIMIZERS, OptimConfig
from cifar_dist.errors import UserError
from cifar_dist.training.muon import MuonSGD


class OptimizerFunction(Protocol):
    """What `optim.name` names: a function."""

    def __call__(self, model: nn.Module, config: OptimConfig, batch_size: int) -> torch.optim.Optimizer:
        """An optimizer of all parameters of `model` that require gradients.

        The learning rate that each group has at first is its peak, which the schedule multiplies. `batch_size` is the
        global one. The settings in `config` may be used or not; `grad_clip`, `ema_decay`, `schedule`, `warmup_share`,
        `label_smoothing` and `norm_scales` apply to every optimizer.
        """


def freeze_bn_scales(model: nn.Module) -> None:
    """Exclude the scales of all batch norms from training. Call before the optimizer is built."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.requires_grad_(False)


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int, muon_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names, each group with its peak learning rate as `peak_lr`.

    Raises:
        UserError: it is an own one that cannot be used, or Muon for a network without filters.
    """
    if config.name in OPTIMIZERS:
        return _built_in(model, config, batch_size, muon_dtype)
    optimizer: torch.optim.Optimizer = extension.create(
        "optim.name", config.name, torch.optim.Optimizer, model, config, batch_size
    )
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given]
    if missing:
        raise UserError(
            f"optim.name is {config.name}, whose optimizer leaves out {len(missing)} parameters of the network, such "
            f"as {missing[0]}. Give it all that require gradients."
        )
    for group in optimizer.param_groups:
        # Numbers of Python, as `checkpoint.encode` refuses those of numpy.
        group.update({key: value.item() for key, value in group.items() if isinstance(value, np.generic)})
        group.setdefault("peak_lr", float(group["lr"]))
    return optimizer


def _built_in(model: nn.Module, config: OptimConfig, batch_size: int, muon_dtype: torch.dtype) -> torch.optim.SGD:
    """Fused SGD with Nesterov momentum, or with `optim.name` muon, Muon for filters and SGD for the rest.

    Groups: filters and matrices (with weight decay), norm scales, biases, and Muon's filters. Muon iterates in
    `muon_dtype`.
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
    if muon and not filters:
        raise UserError(
            "optim.name is muon, but no trained parameter of the network has 4 dimensions. Use optim.name sgd."
        )
    if muon:
        # MuonSGD writes its update into .grad; without momentum, SGD then subtracts lr times it.
        plain_sgd = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        groups.append(
            {"params": filters, "peak_lr": config.muon_lr, "muon_momentum": config.muon_momentum, **plain_sgd}
        )
        optimizer = MuonSGD(groups, muon_dtype, **defaults)
    else:
        optimizer = torch.optim.SGD(groups, **defaults)
    for parameter in trained.values():
        # GradScaler may skip the first step; fused SGD then leaves momentum buffers uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rates(optimizer: torch.optim.Optimizer, config: OptimConfig) -> dict[str, float]:
    """The current learning rates as metrics: `lr` of the first group, `lr/NAME` of each group with another peak."""
    first, groups = optimizer.param_groups[0], optimizer.param_groups
    if config.name in OPTIMIZERS:
        named = dict(zip(("matrices", "scales", "biases", "muon"), groups, strict=False))
    else:  # there may be a group for each parameter
        named = {str(k): group for k, group in enumerate({group["peak_lr"]: group for group in groups}.values())}
    others = {name: group for name, group in named.items() if group["params"] and group["peak_lr"] != first["peak_lr"]}
    return {"lr": first["lr"], **{f"lr/{name}": group["lr"] for name, group in others.items()}}


class Ema(AveragedModel):
    """Exponential moving average of a model's parameters: average = d x average + (1 - d) x parameter.

    d is the smaller of `decay` and (1 + n) / (10 + n) after n updates, so the random initial weights fade quickly.
    AveragedModel's own update waits for the GPU at every step; this one does not.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averages: list[Tensor] = list(self.module.parameters())
        n = int(self.n_averaged)  # a CPU tensor, so reading it does not wait for the GPU
        torch._foreach_lerp_(averages, list(model.parameters()), 1 - min(self._decay, (1 + n) / (10 + n)))
        self.n_averaged += 1
