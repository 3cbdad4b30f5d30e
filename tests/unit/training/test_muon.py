"""Muon: what a step does to filters, and that it is what torch's own Muon does."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import OptimConfig
from cifar_dist.training import optim
from cifar_dist.training.muon import Layout, MuonSGD, orthogonalized, stack_limit

SHAPES = [(8, 24), (24, 8), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    result = orthogonalized(matrices / matrices.norm(dim=(1, 2), keepdim=True))
    values = torch.linalg.svdvals(result)
    # The published polynomial brings every singular value but tiny ones to between 0.7 and 1.2.
    assert values.min() > 0.5
    assert values.max() < 1.25
    # Its direction is that of the nearest orthogonal matrix, U V^T.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vh)).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_a_batch_is_as_each_alone() -> None:
    matrices = torch.randn(4, 6, 10, dtype=torch.float64) / 8
    assert torch.allclose(orthogonalized(matrices)[2:3], orthogonalized(matrices[2:3]), atol=1e-14)


def test_in_bfloat16_it_is_nearly_the_same() -> None:
    """As on GPUs."""
    torch.manual_seed(0)
    matrices = torch.randn(4, 96, 300, dtype=torch.float64)
    matrices /= matrices.norm(dim=(1, 2), keepdim=True)
    exact, rounded = orthogonalized(matrices), orthogonalized(matrices.bfloat16()).double()
    assert (rounded - exact).norm() / exact.norm() < 0.06
    assert torch.linalg.svdvals(rounded).min() > 0.5


def test_padding_changes_nothing() -> None:
    """What is computed in a few stacks on a GPU, and for each shape on a CPU, is what each filter bank alone gives."""
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (40, 16, 1, 1), (16, 24, 3, 3), (24, 16, 1, 1), (8, 16, 5, 5), (16, 24, 3, 3)]
    filters = [torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last) for shape in shapes]
    flat = torch.cat([p.permute(0, 2, 3, 1).flatten() / p.norm() for p in filters])
    expected = [orthogonalized(p[None]) for p in (p.permute(0, 2, 3, 1).flatten(1) / p.norm() for p in filters)]
    for most_stacks, num_stacks in ((None, 5), (3, 2), (1, 1)):
        layout = Layout(filters, most_stacks)
        stacks = layout.stacked(flat)
        assert len(stacks) == num_stacks
        found = layout.unstacked([orthogonalized(stack) for stack in stacks])
        assert torch.allclose(found, torch.cat([matrix.flatten() for matrix in expected]), rtol=0, atol=1e-12)


def test_few_stacks_on_gpus_and_one_for_each_shape_elsewhere() -> None:
    assert stack_limit("cuda") == 6
    assert stack_limit("cpu") is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_zero_gradient_stays_zero(device_type: str) -> None:
    conv = nn.Conv2d(6, 4, 1, bias=False)
    before = conv.weight.detach() * 2 / conv.weight.detach().norm()
    optimizer = optim.build_optimizer(conv, OptimConfig(name="muon"), 128)
    assert isinstance(optimizer, MuonSGD)
    optimizer.layout = Layout([conv.weight], stack_limit(device_type))
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer.step()
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    assert torch.allclose(conv.weight, before)


def by_formula(filters: Tensor, gradients: list[Tensor], rate: float, momentum: float) -> Tensor:
    """The same steps one matrix at a time, as in Jordan's text: X' = a X + (b A + c A A) X with A = X X^T."""
    matrix, buffer = filters.flatten(1).clone(), torch.zeros_like(filters.flatten(1))
    for gradient in gradients:
        buffer = momentum * buffer + gradient.flatten(1)
        x = gradient.flatten(1) + momentum * buffer
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        scale = max(1.0, len(matrix) / matrix.shape[1]) ** 0.5
        matrix = matrix * len(matrix) ** 0.5 / matrix.norm() - rate * scale * x
    return matrix.view(filters.shape)


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


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_three_steps_by_formula_and_by_torch(memory_format: torch.memory_format, device_type: str) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 20, 1)])
    layers.double().to(memory_format=memory_format)
    config = OptimConfig(name="muon", muon_momentum=0.8)
    optimizer = optim.build_optimizer(layers, config, 128, torch.float64)
    filters = [p for p in layers.parameters() if p.ndim == 4]
    assert isinstance(optimizer, MuonSGD)
    optimizer.layout = Layout(filters, stack_limit(device_type))
    gradients = [[torch.randn_like(p) for p in filters] for _ in range(3)]
    expected, roughly = (
        [by(p.detach(), [step[k] for step in gradients], 0.1, config.muon_momentum) for k, p in enumerate(filters)]
        for by in (by_formula, by_torch)
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in gradients:
        for p, gradient in zip(filters, step, strict=True):
            p.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
        optimizer.zero_grad()
    for p, same, similar in zip(filters, expected, roughly, strict=True):
        assert (p - same).norm() / same.norm() < 1e-12
        assert (p - similar).norm() / similar.norm() < 0.01  # torch iterates in bfloat16, of three significant digits
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
