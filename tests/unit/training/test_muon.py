"""Muon: what a step does to filters, and that it is what torch's own Muon does."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.config import OptimConfig
from cifar_dist.training import muon, optim
from cifar_dist.training.muon import MuonSGD, PaddedStacks, StackPerShape, orthogonalized

SHAPES = [(8, 24), (24, 8), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    matrices /= matrices.norm(dim=(1, 2), keepdim=True)
    result = orthogonalized(matrices)
    values = torch.linalg.svdvals(result)[torch.linalg.svdvals(matrices) >= 0.01]
    assert len(values) > 3 * min(shape) - 3
    assert values.min() > 0.7
    assert values.max() < 1.3
    # Its direction is that of the nearest orthogonal matrix, U V^T.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vh)).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_a_batch_is_as_each_alone() -> None:
    matrices = torch.randn(4, 6, 10, dtype=torch.float64) / 8
    assert torch.allclose(orthogonalized(matrices)[2:3], orthogonalized(matrices[2:3]), atol=1e-14)


def test_in_bfloat16_it_is_nearly_the_same() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, 96, 300, dtype=torch.float64)
    matrices /= matrices.norm(dim=(1, 2), keepdim=True)
    exact, rounded = orthogonalized(matrices), orthogonalized(matrices.bfloat16()).double()
    assert (rounded - exact).norm() / exact.norm() < 0.06
    assert torch.linalg.svdvals(rounded).min() > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_matrix_of_rank_one(dtype: torch.dtype) -> None:
    """Its singular value is 1, which rounding may exceed; where the first polynomial is steepest."""
    torch.manual_seed(0)
    for rows, columns in ((40, 40), (64, 576)):
        u, v = (F.normalize(torch.randn(size, dtype=torch.float64), dim=0) for size in (rows, columns))
        result = orthogonalized(torch.outer(u, v)[None].to(dtype)).double()[0]
        assert 0.7 < (u @ result @ v).item() < 1.3
        assert torch.linalg.svdvals(result)[0] < 1.3


def test_small_singular_values_survive_the_way_over_the_gram_matrix() -> None:
    """In float32 their squares are near its rounding."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(128, 32, dtype=torch.float64))
    values = torch.logspace(0, -3.5, 32, dtype=torch.float64)
    matrix = (u * values) @ v.T
    result = orthogonalized((matrix / matrix.norm())[None].float()).double()[0]
    found = torch.diagonal(u.T @ result @ v)
    one = matrix / matrix.norm()
    for a, b, c in muon._POLYNOMIALS:
        gram = one @ one.T / muon._SAFETY**2
        one = (a * one + (b * gram + c * gram @ gram) @ one) / muon._SAFETY
    assert ((found - torch.diagonal(u.T @ one @ v)) / found).abs().max() < 0.02


FILTERS = [(8, 3, 3, 3), (40, 16, 1, 1), (16, 24, 3, 3), (24, 16, 1, 1), (8, 16, 5, 5), (16, 24, 3, 3)]


@pytest.mark.parametrize("most_stacks", [None, 3, 1])
def test_stacks_change_nothing(most_stacks: int | None) -> None:
    """What is computed for each shape on a CPU, and in a few padded stacks on a GPU, is what a matrix alone gives."""
    torch.manual_seed(0)
    filters = [torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last) for shape in FILTERS]
    norms = torch.stack([p.norm() for p in filters])
    matrices = [(p / p.norm()).permute(0, 2, 3, 1).flatten(1) for p in filters]
    expected = [
        orthogonalized(m[None])[0] if len(m) <= m.shape[1] else orthogonalized(m.T[None])[0].T for m in matrices
    ]
    layout = StackPerShape(filters) if most_stacks is None else PaddedStacks(filters, most_stacks)
    found = [torch.empty_like(p) for p in filters]
    planes = [torch.empty(p.shape, dtype=p.dtype) for p in filters]  # as after a change of train.channels_last
    for results in (planes, found):
        layout.orthogonalize(filters, norms, torch.float64, results)
        for result, matrix in zip(results, expected, strict=True):
            assert torch.allclose(result.permute(0, 2, 3, 1).flatten(1), matrix, rtol=0, atol=1e-12)
    layout.scale(found, torch.arange(6.0, dtype=torch.float64))
    for k, (result, matrix) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(result.permute(0, 2, 3, 1).flatten(1), k * matrix, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("stacks", "calls"), [(StackPerShape, 5), (PaddedStacks, 2)])
def test_few_stacks(stacks: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each shape on a CPU; on a GPU those of similar size together."""
    filters, seen = [torch.randn(shape) for shape in FILTERS], list[Tensor]()
    monkeypatch.setattr(muon, "orthogonalized", lambda stack: seen.append(stack) or stack)  # type: ignore[func-returns-value]
    stacks(filters).orthogonalize(filters, torch.ones(6), torch.float32, [torch.empty_like(p) for p in filters])
    assert len(seen) == calls


@pytest.mark.parametrize(("rows", "expected"), [(120, torch.float32), (128, torch.bfloat16)])
def test_large_matrices_in_bfloat16_on_a_cpu(rows: int, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    filters, seen = [torch.randn(rows, 16, 3, 3)], list[torch.dtype]()
    monkeypatch.setattr(muon, "orthogonalized", lambda stack: seen.append(stack.dtype) or stack)  # type: ignore[func-returns-value]
    StackPerShape(filters).orthogonalize(filters, torch.ones(1), torch.bfloat16, [torch.empty_like(filters[0])])
    assert seen == [expected]


@pytest.mark.parametrize("stacks", [StackPerShape, PaddedStacks])
def test_filters_that_are_all_zeros(stacks: Any) -> None:
    """As an own network may start its last convolution: the update is added to them."""
    conv = nn.Conv2d(6, 4, 1, bias=False)
    nn.init.zeros_(conv.weight)
    optimizer = optim.build_optimizer(conv, OptimConfig(name="muon"), 128)
    assert isinstance(optimizer, MuonSGD)
    optimizer.layout = stacks([conv.weight])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    assert torch.allclose(conv.weight, -0.1 * conv.weight.grad)
    assert conv.weight.norm() > 0.1


@pytest.mark.parametrize("stacks", [StackPerShape, PaddedStacks])
def test_zero_gradient_stays_zero(stacks: Any) -> None:
    conv = nn.Conv2d(6, 4, 1, bias=False)
    before = conv.weight.detach() * 2 / conv.weight.detach().norm()
    optimizer = optim.build_optimizer(conv, OptimConfig(name="muon"), 128)
    assert isinstance(optimizer, MuonSGD)
    optimizer.layout = stacks([conv.weight])
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer.step()
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    assert torch.allclose(conv.weight, before)


def by_formula(filters: Tensor, gradients: list[Tensor], rate: float, momentum: float) -> Tensor:
    """The same steps one matrix at a time: X' = a X + (b A + c A A) X with A = X X^T, as in Jordan's text."""
    matrix, buffer = filters.flatten(1).clone(), torch.zeros_like(filters.flatten(1))
    for gradient in gradients:
        buffer = momentum * buffer + gradient.flatten(1)
        x = gradient.flatten(1) + momentum * buffer
        x = x / x.norm()
        for a, b, c in muon._POLYNOMIALS:
            gram = x @ x.T / muon._SAFETY**2
            x = (a * x + (b * gram + c * gram @ gram) @ x) / muon._SAFETY
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


@pytest.mark.parametrize("stacks", [StackPerShape, PaddedStacks])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_three_steps_by_formula_and_by_torch(memory_format: torch.memory_format, stacks: Any) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 20, 1)])
    layers.double().to(memory_format=memory_format)
    config = OptimConfig(name="muon", muon_momentum=0.8)
    optimizer = optim.build_optimizer(layers, config, 128, torch.float64)
    filters = [p for p in layers.parameters() if p.ndim == 4]
    assert isinstance(optimizer, MuonSGD)
    optimizer.layout = stacks(filters)
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
        # torch iterates in bfloat16, with a polynomial that brings singular values to between 0.7 and 1.2.
        assert (p - similar).norm() / similar.norm() < 0.1
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
