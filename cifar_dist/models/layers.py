"""Layers and initialisation that all networks share."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.fused import norm_relu


@dataclass(frozen=True)
class Variant:
    """Differences between published implementations of the same tables.

    The defaults are this project's; the instances below are for exchanging weights with other libraries.
    """

    norm: Literal["batch", "none"] = "batch"
    """After every convolution; none: a bias instead."""
    conv_bias: bool = False
    """A bias before batch norm, which the norm cancels."""
    eps: float = 1e-5
    """Added to the variance in batch norm."""
    ceil_pools: bool = False
    """Pools of stride 2 have no padding and round their output size up. By default they have padding 1 and round down.
    On grids of even size the output sizes are equal; windows differ."""
    last_pool_size: int = 3
    """Window size of the last of these pools."""
    adaptive_auxiliary: bool = False
    """Auxiliary classifiers pool to a 4x4 grid instead of the paper's 5x5 windows with stride 3."""

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "none"):
            raise ValueError(f"norm is {self.norm!r}; valid: batch, none")


DEFAULT = Variant()
TORCHVISION = Variant(eps=1e-3, ceil_pools=True, last_pool_size=2, adaptive_auxiliary=True)  # its googlenet
CADENE = Variant(conv_bias=True, ceil_pools=True)  # bninception of pretrained-models.pytorch


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, at least 8: the granularity of tensor cores.

    All channel counts of the published tables are multiples of 8, so width 1 does not change them.
    """
    return max(8, round(channels * width / 8) * 8)


class WithoutAverages(nn.modules.batchnorm._BatchNorm):
    """Batch norm (arXiv 1502.03167) without running averages in training, for any number of dimensions.

    Running averages would differ between ranks, and at a high learning rate they are a poor estimate. The statistics
    are computed before each evaluation instead, by `torch.optim.swa_utils.update_bn`, which sets `momentum` to None
    while it runs.
    """

    @property
    def recalibrating(self) -> bool:
        """Whether a forward pass in training mode updates the running statistics."""
        return self.momentum is None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.recalibrating:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class BatchNorm2d(WithoutAverages, nn.BatchNorm2d):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps, momentum=0.0)


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm (unless `variant.norm` is none), ReLU. With stride 1 the grid keeps its size.

    In training norm and ReLU are one function, so hooks on these two layers are not called.

    Shapes: (N, `in_channels`, H, W) to (N, `out_channels`, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, variant: Variant = DEFAULT
    ) -> None:
        bias = variant.conv_bias or variant.norm == "none"
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        norms = [BatchNorm2d(out_channels, variant.eps)] if variant.norm == "batch" else []
        super().__init__(conv, *norms, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm is None or not norm.training or norm.recalibrating:
            for layer in self:
                x = layer(x)
            return x
        return norm_relu(self.conv(x), norm.weight, norm.bias, norm.eps)

    @property
    def conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> BatchNorm2d | None:
        return cast(BatchNorm2d, self[1]) if len(self) == 3 else None


def halving_pool(variant: Variant, kernel_size: int = 3) -> nn.MaxPool2d:
    """Max-pool of stride 2, which halves a grid of even size."""
    if variant.ceil_pools:
        return nn.MaxPool2d(kernel_size, stride=2, ceil_mode=True)
    return nn.MaxPool2d(kernel_size, stride=2, padding=(kernel_size - 1) // 2)


def init_weights(module: nn.Module, variant: Variant = DEFAULT) -> None:
    """Random weights, from torch's global generator, for all convolutions and linear layers that a ReLU follows.

    With batch norm: He initialisation (arXiv 1502.01852), biases 0. Without: as Caffe's GoogLeNet, uniform with
    variance 1 / fan-in, biases 0.2.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if variant.norm == "none":
            # He initialisation also trains, but only at lower learning rates: after 175 steps of SGD on 128 images
            # (rate 0.03, width 0.25), training accuracy was 28 %, with these weights 40 %.
            _init_as_caffe(layer, bias=0.2)
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_classifier(layer: nn.Linear, variant: Variant = DEFAULT) -> None:
    """Small random weights from torch's global generator, so that all initial logits are nearly equal."""
    if variant.norm == "none":
        _init_as_caffe(layer, bias=0.0)
    else:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def _init_as_caffe(layer: nn.Conv2d | nn.Linear, bias: float) -> None:
    bound = math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, without batch-norm statistics."""
    return sum(parameter.numel() for parameter in model.parameters())
