"""Muon: what a step does to filters, and that it is what torch's own Muon does."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import OptimConfig
from cifar_dist.training import optim
from cifar_dist.training.muon import orthogonalized

SHAPES = [(8, 24), (24, 8), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    matrices[1] *= 1e6  # length does not matter
    result = orthogonalized(matrices)
    values = torch.linalg.svdvals(result)
    # The published polynomial brings every singular value but tiny ones to between 0.7 and 1.2.
    assert values.min() > 0.5
    assert values.max() < 1.25
    # Its direction is that of the nearest orthogonal matrix, U V^T.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vh)).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_a_batch_is_as_each_alone() -> None:
    matrices = torch.randn(4, 6, 10, dtype=torch.float64)
    assert torch.allclose(orthogonalized(matrices)[2:3], orthogonalized(matrices[2:3]), atol=1e-14)


def test_zero_gradient_stays_zero() -> None:
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def by_torch(filters: Tensor, gradients: list[Tensor], rate: float, momentum: float) -> Tensor:
    """The same steps by torch.optim.Muon on the flattened filters, each first brought to the norm sqrt(rows)."""
    matrix = nn.Parameter(filters.flatten(1).clone())
    muon = torch.optim.Muon([matrix], lr=rate, momentum=momentum, nesterov=True, weight_decay=0.0)
    for gradient in gradients:
        with torch.no_grad():
            matrix.mul_(len(matrix) ** 0.5 / matrix.norm())
        matrix.grad = gradient.flatten(1)
        muon.step()  # type: ignore[no-untyped-call]
    return matrix.detach().view(filters.shape)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_three_steps_are_those_of_torch(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 20, 1)])
    layers.to(memory_format=memory_format)
    config = OptimConfig(name="muon", muon_momentum=0.8)
    optimizer = optim.build_optimizer(layers, config, 128)
    filters = [p for p in layers.parameters() if p.ndim == 4]
    gradients = [[torch.randn_like(p) for p in filters] for _ in range(3)]
    expected = [
        by_torch(p.detach(), [step[k] for step in gradients], 0.1, config.muon_momentum) for k, p in enumerate(filters)
    ]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in gradients:
        for p, gradient in zip(filters, step, strict=True):
            p.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
        optimizer.zero_grad()
    for p, other in zip(filters, expected, strict=True):
        # Torch iterates in bfloat16, of three significant digits.
        assert (p - other).norm() / other.norm() < 0.01
        assert p.is_contiguous(memory_format=memory_format)


def test_everything_but_filters_is_left_to_sgd() -> None:
    torch.manual_seed(0)
    results = []
    names: tuple[Literal["sgd", "muon"], ...] = ("sgd", "muon")
    for name in names:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        optimizer = optim.build_optimizer(net, OptimConfig(name=name), 128)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    (filters_sgd, *others_sgd), (filters_muon, *others_muon) = results
    assert not torch.allclose(filters_sgd, filters_muon)
    assert all(torch.equal(a, b) for a, b in zip(others_sgd, others_muon, strict=True))
