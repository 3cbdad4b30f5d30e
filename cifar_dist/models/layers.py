"""The parts that the networks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8 (at least 8), which matrix units like.

    Every channel count of the published tables is such a multiple, so width 1 changes nothing.
    """
    return max(8, round(channels * width / 8) * 8)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm (arXiv 1502.03167) whose running statistics training leaves alone.

    Running averages would differ from rank to rank, so a checkpoint would depend on the number of devices, and
    their decay makes them a poor estimate at a high learning rate. They are computed before each evaluation
    instead, by `torch.optim.swa_utils.update_bn`, which signals itself by setting `momentum` to None.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-5, momentum=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.momentum is not None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; the padding keeps the grid at stride 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        super().__init__(conv, BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Stem(nn.Sequential):
    """From the image to the first Inception module; kind is cifar, pooled or strided.

    Shapes: (N, 3, 32, 32) to (N, `out_channels`, grid, grid), grid 32 for `cifar` and 16 otherwise.
    """

    def __init__(self, kind: str, out_channels: int, width: float) -> None:
        if kind == "cifar":
            parts: list[nn.Module] = [ConvNormAct(3, out_channels, 3)]
        elif kind == "strided":
            parts = [ConvNormAct(3, out_channels, 3, stride=2)]
        elif kind == "pooled":
            hidden = scaled(64, width)
            parts = [
                ConvNormAct(3, hidden, 3),
                nn.MaxPool2d(3, stride=2, padding=1),
                ConvNormAct(hidden, hidden, 1),
                ConvNormAct(hidden, out_channels, 3),
            ]
        else:
            raise ValueError(f"stem is {kind!r}; valid: cifar, pooled, strided")
        super().__init__(*parts)


def initialize(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852) of the filters; norms start at scale 1 and bias 0.

    It draws from torch's global generator: seed that first.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def num_parameters(model: nn.Module) -> int:
    """How many trained numbers the model has; batch-norm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
