"""The machine code for one CPU thread against torch in float64: batch norm with ReLU, and pools of 3x3."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.models import fused
from cifar_dist.models.fused import AvgPool3x3, MaxPool3x3, norm_relu

# (N, C, H, W): as in the networks; one pixel; odd sizes; more channels than an inner loop has numbers.
SHAPES = [(16, 24, 16, 16), (8, 104, 6, 6), (5, 8, 1, 1), (2, 7, 2, 5), (3, 1, 7, 1), (4, 900, 3, 3)]
DTYPES = [torch.bfloat16, torch.float32]
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    MaxPool3x3(), AvgPool3x3(), lambda x: norm_relu(x, torch.ones(8), torch.zeros(8), 1e-5)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """With many equal values, also neighbouring ones."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (numbers * 4).round().div(4).to(dtype).contiguous(memory_format=torch.channels_last)


def gradients(function: Callable[..., Tensor], gradient: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def plain(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, scale, bias, training=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_with_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gradient = random(shape, dtype) * 3 + 7, random(shape, dtype, seed=1)
    torch.manual_seed(0)  # with which no output is as good as zero, where rounding decides on the gradient
    scale, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    assert fused.can_use_kernels(x)
    found = gradients(lambda x, scale, bias: norm_relu(x, scale, bias, 1e-5), gradient, x, scale, bias)
    exact = gradients(plain, gradient.double(), x.double(), scale.double(), bias.double())
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == (dtype if ours.ndim == 4 else torch.float32)
        near = 2e-2 if dtype == torch.bfloat16 else 2e-4
        assert (ours - wanted).norm() <= near * wanted.norm() + 1e-4
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ["large mean", "first pixel far away", "many channels"])
def test_sums_keep_their_digits(case: str) -> None:
    x = random((64, 400 if case == "many channels" else 8, 16, 16), torch.float32)
    if case == "large mean":
        x += 4000
    elif case == "first pixel far away":
        x[0, :, 0, 0] = 1000
    ones = torch.ones(x.shape[1])
    found, exact = norm_relu(x, ones, 0 * ones, 1e-5), plain(x.double(), ones.double(), 0 * ones.double())
    assert (found - exact).norm() < (3e-4 if case == "large mean" else 1e-6) * exact.norm()


@pytest.mark.parametrize(
    ("scale", "bias"),
    [(torch.ones(9), torch.zeros(8)), (torch.ones(8), torch.zeros(4)), (torch.ones(1000), torch.zeros(1000))],
)
def test_wrong_parameters_are_refused_as_by_torch(scale: Tensor, bias: Tensor) -> None:
    with pytest.raises(RuntimeError, match="elements"):
        norm_relu(random((2, 8, 4, 4), torch.float32), scale, bias, 1e-5)


def test_parameters_and_inputs_that_the_kernels_do_not_take() -> None:
    x, wide = random((2, 8, 4, 4), torch.float32), torch.randn(8, 2)
    expected = plain(x, wide[:, 0], wide[:, 1])
    assert torch.allclose(norm_relu(x, wide[:, 0], wide[:, 1], 1e-5), expected, atol=1e-5)
    assert norm_relu(x[:0], torch.ones(8), torch.zeros(8), 1e-5).shape == (0, 8, 4, 4)
    assert MaxPool3x3()(x[:0]).shape == AvgPool3x3()(x[:0]).shape == (0, 8, 4, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(x[:1, :, :1, :1], torch.ones(8), torch.zeros(8), 1e-5)


def test_no_wrong_second_derivatives() -> None:
    for function in FUNCTIONS:
        x = random((2, 8, 4, 4), torch.float32).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.backward((gradient.square() + x.square()).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_max_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first of equal values gets the gradient; the sum of gradients is rounded once."""
    x, gradient = random(shape, dtype), random(shape, dtype, seed=1)
    output, of_x = gradients(MaxPool3x3(), gradient, x)
    exact_output, exact = gradients(lambda x: F.max_pool2d(x, 3, 1, 1), gradient.double(), x.double())
    assert torch.equal(output, exact_output.to(dtype))
    assert torch.equal(of_x, exact.to(dtype))  # quarters: their sums are exact in float32
    assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_average_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gradient = random(shape, dtype), random(shape, dtype, seed=1)
    found = gradients(AvgPool3x3(), gradient, x)
    exact = gradients(lambda x: F.avg_pool2d(x, 3, 1, 1), gradient.double(), x.double())
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours - wanted).abs().max() < torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_visible(dtype: torch.dtype, bad: float) -> None:
    x = random((2, 8, 4, 4), dtype)
    x[1, 3, 2, 1] = bad
    assert torch.equal(MaxPool3x3()(x).isnan(), F.max_pool2d(x, 3, 1, 1).isnan())
    assert torch.equal(AvgPool3x3()(x).isfinite(), F.avg_pool2d(x, 3, 1, 1).isfinite())
    normed = norm_relu(x, torch.ones(8), torch.zeros(8), 1e-5)
    assert normed[:, 3].isnan().all()
    assert normed[:, :3].isfinite().all()


def test_gradients_in_another_order_of_memory() -> None:
    x, gradient = random((2, 8, 4, 4), torch.float32), random((2, 8, 4, 4), torch.float32, seed=1)
    for function in FUNCTIONS:
        (_, one), (_, other) = (gradients(function, given, x) for given in (gradient, gradient.contiguous()))
        assert torch.equal(one, other)


@pytest.mark.parametrize("why", ["threads", "float64", "planes", "compiled", "GPU"])
def test_otherwise_by_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((2, 8, 4, 4), torch.float64 if why == "float64" else torch.float32)
    assert fused.can_use_kernels(x) == (why != "float64")
    if why == "threads":
        torch.set_num_threads(2)
    elif why == "planes":
        x = x.contiguous()
    elif why == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif why == "GPU":
        x = x.to("meta")
    monkeypatch.setattr(fused, "_run", lambda *_: pytest.fail("the kernels ran"))
    ones = torch.ones(8, dtype=x.dtype, device=x.device)
    assert MaxPool3x3()(x).shape == AvgPool3x3()(x).shape == norm_relu(x, ones, ones, 1e-5).shape == x.shape
