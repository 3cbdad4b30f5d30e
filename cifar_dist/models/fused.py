"""Batch norm with ReLU, and pools of 3x3: by `kernels` on one CPU thread, else by torch.

torch's take half of a training step of a narrow network there: it goes over the data more often than necessary, and in
pools handles each number by itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def norm_relu(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """ReLU of batch norm (arXiv 1502.03167) with the statistics of `x`, (N, C, H, W)."""
    if can_use_kernels(x) and x.numel() > x.shape[1] and _is_simple(scale, x) and _is_simple(bias, x):
        return _apply(_NormRelu, x, scale, bias, eps)
    return F.relu_(F.batch_norm(x, None, None, scale, bias, training=True, eps=eps))


class MaxPool3x3(nn.MaxPool2d):
    """Max-pool of 3x3 with stride 1. Where values are equal, the first in reading order gets the gradient.

    Shapes: (N, C, H, W) to the same.
    """

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(_MaxPool, x) if can_use_kernels(x) else F.max_pool2d(x, 3, stride=1, padding=1)


class AvgPool3x3(nn.AvgPool2d):
    """Mean of 3x3 pixels, with zeros outside of the image; (N, C, H, W) to the same."""

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(_AvgPool, x) if can_use_kernels(x) else F.avg_pool2d(x, 3, stride=1, padding=1)


def can_use_kernels(x: Tensor) -> bool:
    """Whether `kernels` handle activations like `x`, (N, C, H, W), instead of torch's operations."""
    simple = x.device.type == "cpu" and x.dtype in _BITS and x.is_contiguous(memory_format=torch.channels_last)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or type(x) is not Tensor
    return simple and not traced and torch.get_num_threads() == 1


def _is_simple(parameter: Tensor, x: Tensor) -> bool:
    """Whether there is a float32 number for each channel; what is wrong otherwise torch says."""
    return parameter.shape == x.shape[1:2] and parameter.dtype == torch.float32 and parameter.is_contiguous()


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, statistics = torch.empty_like(x), scale.new_empty(4, len(scale))
        _run("norm_forward", x, scale, bias, eps, y, statistics)
        ctx.save_for_backward(x, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, statistics = ctx.saved_tensors
        results = torch.empty_like(x), torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
        _run("norm_backward", x, _dense(gradient), statistics, *results)
        return *results, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _run("pool_forward", x, y)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, y = ctx.saved_tensors
        result = torch.empty_like(x)
        _run("pool_backward", x, y, _dense(gradient), result)
        return result


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _mean_pool(x)

    @staticmethod
    @once_differentiable
    def backward(_: Any, gradient: Tensor) -> Any:
        return _mean_pool(_dense(gradient))


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)
    return output


def _mean_pool(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _run("mean_pool", x, y)
    return y


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _run(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a function of `kernels` for numbers of the type of `x`."""
    from cifar_dist.models import kernels  # here, as importing numba takes a second

    arrays = [_array(value) if isinstance(value, Tensor) else value for value in (x, *arguments)]
    kernels.compiled(getattr(kernels, name), x.dtype.itemsize)(*arrays)


def _array(x: Tensor) -> Any:
    x = x.detach()
    return x.permute(0, 2, 3, 1).view(_BITS[x.dtype]).numpy() if x.ndim == 4 else x.numpy()
