"""Sums of gradients: exact for any order of micro-batches, and never wrong in silence."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import PrecisionName
from cifar_dist.distributed import data_parallel
from cifar_dist.training.exact_sum import FRACTION_BITS, ExactSum
from tests.support.runs import REPOSITORY

# Sums of these depend on their order in float32, and the smallest are below the resolution of the largest.
HARD = ([1.0, 3e-9, -2e-12, 0.1], [32.25, -3e-9, 1.5e-13, 0.2], [-32.0, 5e-8, 3e-14, -0.3])


class Echo(nn.Module):
    """Its parameter's gradient is the input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class Summing:
    """A module in DDP whose gradients are added exactly."""

    def __init__(self, precision: PrecisionName = "fp32", num_micro_batches: int = 3) -> None:
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.module = Echo(self.dtype)
        self.parallel = data_parallel(self.module)
        for _ in range(2):
            torch.autograd.backward(self.parallel(torch.zeros(4, dtype=self.dtype)))
        self.sum = ExactSum(self.parallel, precision, num_micro_batches, several_ranks=False)

    def add(self, *gradients: list[float]) -> tuple[Tensor, bool]:
        """The sum over one step's micro-batches with these gradients, and whether all could be added."""
        self.module.weight.grad.zero_()  # type: ignore[union-attr]
        for k, gradient in enumerate(gradients, 1):
            self.sum.last = k == len(gradients)
            torch.autograd.backward(self.parallel(torch.tensor(gradient, dtype=self.dtype)))
        usable = bool(self.sum.finish())
        assert self.module.weight.grad is not None
        return self.module.weight.grad.clone(), usable


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp64"])
def test_the_sum_is_that_of_the_rounded_terms(precision: PrecisionName) -> None:
    """By exact fractions; rounded once at the end."""
    summing = Summing(precision, num_micro_batches=16)
    found, usable = summing.add(*HARD)
    unit = Fraction(1, 2 ** FRACTION_BITS[precision])
    terms = torch.tensor(HARD, dtype=summing.dtype).T.tolist()  # as the number format has them
    expected = [float(sum(round(Fraction(value) / unit) for value in column) * unit) for column in terms]
    assert usable
    assert found.tolist() == torch.tensor(expected, dtype=torch.float64).to(summing.dtype).tolist()


def test_the_order_does_not_matter() -> None:
    sums, floats = set(), set()
    for order in itertools.permutations(HARD):
        sums.add(tuple(Summing(num_micro_batches=16).add(*order)[0].tolist()))
        floats.add(tuple(functools.reduce(torch.add, map(torch.tensor, order)).tolist()))
    assert len(sums) == 1 < len(floats)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, -(2.0**17)])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_an_unusable_element_spoils_the_step_and_not_the_next(bad: float, micro_batch: int) -> None:
    """Whatever is too large for the range counts as unusable and never wraps around."""
    summing = Summing(num_micro_batches=3)
    gradients = [[1.0, 2.0, 3.0, 4.0] for _ in range(3)]
    gradients[micro_batch][2] = bad
    found, usable = summing.add(*gradients)
    assert not usable
    assert found.isnan().all()
    found, usable = summing.add(*([1.0, 2.0, 3.0, 4.0] for _ in range(3)))
    assert usable
    assert found.tolist() == [3.0, 6.0, 9.0, 12.0]


def test_the_largest_elements_add_up_without_wrapping() -> None:
    largest = 2.0 ** (62 - FRACTION_BITS["fp32"]) / 4
    below = torch.nextafter(torch.tensor(largest), torch.tensor(0.0)).item()
    summing = Summing(num_micro_batches=4)
    found, usable = summing.add(*([below, -below, 0.0, 1.0] for _ in range(4)))
    assert usable
    assert found.tolist() == [4 * below, -4 * below, 0.0, 4.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_accumulation_and_two_processes_on_one_device(device: str) -> None:
    """The same program on a CPU shows that it works, until there is a GPU to run it on."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    words = [sys.executable, "-m", "tests.support.real_gpu", "equal", device]
    subprocess.run(words, cwd=REPOSITORY, env=environment, check=True)
