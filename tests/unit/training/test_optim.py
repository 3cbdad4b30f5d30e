"""Parameter groups, their learning rates, SGD, and the moving average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import OptimConfig
from cifar_dist.errors import UserError
from cifar_dist.models.architectures import inception_v1
from cifar_dist.training import checkpoint, optim
from cifar_dist.training.precision import Precision


def test_peak_learning_rates() -> None:
    layer = nn.Conv2d(3, 4, 3)
    sgd, muon = OptimConfig(name="sgd", lr=0.1), OptimConfig(name="muon", lr=0.1, muon_lr=0.03)
    # SGD's is for a batch of 128, Muon's for any.
    assert [g["peak_lr"] for g in optim.build_optimizer(layer, sgd, 256).param_groups] == [0.2] * 3
    assert [g["peak_lr"] for g in optim.build_optimizer(layer, muon, 256).param_groups] == [0.2, 0.2, 0.2, 0.03]


def test_groups_of_parameters() -> None:
    """No weight decay on norms and biases; the rate of biases is raised; fixed scales are in no group."""
    model = inception_v1(stem="strided", width=0.125)
    config = OptimConfig(name="sgd", lr=0.1, bias_lr_factor=8)
    decayed, scales, biases = optim.build_optimizer(model, config, 128).param_groups
    assert [group["weight_decay"] for group in (decayed, scales, biases)] == [5e-4, 0.0, 0.0]
    assert [group["peak_lr"] for group in (decayed, scales, biases)] == pytest.approx([0.1, 0.1, 0.8])
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(scales["params"]) == len(biases["params"]) - 1 == 55  # one norm per convolution, and the classifier
    assert sum(len(group["params"]) for group in (decayed, scales, biases)) == len(list(model.parameters()))
    optim.freeze_bn_scales(model)
    decayed, scales, biases = optim.build_optimizer(model, config, 128).param_groups
    assert scales["params"] == []
    assert len(biases["params"]) == 56


def test_sgd_is_nesterov_as_sutskever_wrote_it() -> None:
    """Three steps on one weight against the recurrence, done by hand."""
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    optimizer = optim.build_optimizer(layer, OptimConfig(name="sgd", momentum=0.9, weight_decay=0.1), 128)
    expected, velocity = 2.0, 0.0
    for rate in (0.1, 0.2, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = 3 * weight.detach()
        gradient = 3 * expected + 0.1 * expected
        velocity = 0.9 * velocity + gradient
        expected -= rate * (gradient + 0.9 * velocity)
        optimizer.step()
    assert weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", [OptimConfig(name="sgd"), OptimConfig(name="muon")])
def test_first_fp16_step_may_be_skipped(config: OptimConfig) -> None:
    """An overflow in the very first step: the scaler skips it, and what follows is as if it had not been."""
    results = []
    for overflow in (False, True):
        layer = nn.Conv2d(64, 64, 1, bias=False)
        nn.init.constant_(layer.weight, 0.5)
        optimizer = optim.build_optimizer(layer, config, 128)
        scaler = Precision("fp16", "cpu").grad_scaler()
        for gradient in ([float("inf")] if overflow else []) + [1.0, 2.0]:
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            layer.weight.grad = torch.full_like(layer.weight, gradient) * scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        results.append(layer.weight.detach().clone())
    assert torch.equal(*results)


def test_ema_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = optim.Ema(model, 0.2)
    for value in (1.0, 2.0, 4.0):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
    (average,) = ema.module.parameters()
    # The decay rises: 1/10, 2/11, then 0.2 instead of 3/12.
    first = 0.9
    second = 2 / 11 * first + 9 / 11 * 2
    assert average.item() == pytest.approx(0.2 * second + 0.8 * 4)


def adamw(model: nn.Module, config: OptimConfig, batch_size: int) -> torch.optim.Optimizer:
    """Two groups; the peak rate of the second is that of a global batch of 128."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trained[:1]},
        {"params": trained[1:], "lr": config.lr * batch_size / 128},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def of_numpy(model: nn.Module, *_: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1 * np.sqrt(2), momentum=np.exp(-0.1))


def half(model: nn.Module, *_: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.parameters())[:1], lr=0.1)


def test_own_optimizer() -> None:
    layer = nn.Conv2d(3, 4, 3)
    optimizer = optim.build_optimizer(layer, OptimConfig(name=f"{__name__}:adamw", lr=0.1), 256)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["peak_lr"] for group in optimizer.param_groups] == [1e-3, 0.2]
    with pytest.raises(UserError, match="leaves out 1 parameters of the network, such as bias"):
        optim.build_optimizer(layer, OptimConfig(name=f"{__name__}:half"), 256)
    layer.bias.requires_grad_(False)  # type: ignore[union-attr]
    optim.build_optimizer(layer, OptimConfig(name=f"{__name__}:half"), 256)


def test_numbers_of_numpy_can_be_saved() -> None:
    optimizer = optim.build_optimizer(nn.Linear(2, 2), OptimConfig(name=f"{__name__}:of_numpy"), 128)
    state = checkpoint.decode(checkpoint.encode(0, {"model": {}, "config": "", **optimizer.state_dict()}), "it")
    assert state["param_groups"][0]["momentum"] == np.exp(-0.1)


def test_learning_rates_are_logged_by_group() -> None:
    """Only of groups with another peak: here biases and Muon's filters. An own optimizer's have numbers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    config = OptimConfig(name="muon", lr=0.1, muon_lr=0.3, bias_lr_factor=4.0)
    optimizer = optim.build_optimizer(model, config, 128)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] / 2
    assert optim.learning_rates(optimizer, config) == pytest.approx({"lr": 0.05, "lr/biases": 0.2, "lr/muon": 0.15})
    plain = replace(config, name="sgd", bias_lr_factor=1.0)
    assert optim.learning_rates(optim.build_optimizer(model, plain, 128), plain) == {"lr": 0.0}
    own = torch.optim.SGD([{"params": [p], "lr": 1.0 + (p.ndim == 1), "peak_lr": p.ndim} for p in model.parameters()])
    assert optim.learning_rates(own, replace(config, name="my:optimizer")) == {"lr": 1.0, "lr/1": 2.0, "lr/2": 1.0}


def test_muon_needs_filters() -> None:
    with pytest.raises(UserError, match=r"no trained parameter .* has 4 dimensions. Use optim.name sgd"):
        optim.build_optimizer(nn.Linear(3, 4), OptimConfig(name="muon"), 128)


def test_fixed_scales_of_a_norm_without_them() -> None:
    layers = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    optim.freeze_bn_scales(layers)
    assert [name for name, p in layers.named_parameters() if p.requires_grad] == ["1.bias"]
