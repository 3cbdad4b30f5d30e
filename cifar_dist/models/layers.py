"""The parts that the networks share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Dialect:
    """Where published implementations of the same tables differ.

    The defaults are this project's; the named instances below exist to exchange weights with others.
    """

    norm: Literal["batch", "none"] = "batch"
    """After every convolution; none: a bias in its place."""
    conv_bias: bool = False
    """A bias before batch norm too, which batch norm takes away again."""
    eps: float = 1e-5
    """Added to the variance in batch norm."""
    ceil_pools: bool = False
    """Pools that halve the grid have no padding and round up, so that the last windows hang over the edge; by
    default they have padding 1 and round down. Equal sizes, other windows."""
    last_pool_size: int = 3
    """Side of the window of the last of these pools."""
    adaptive_auxiliary: bool = False
    """Auxiliary heads pool to a 4x4 grid, in place of the paper's 5x5 windows at stride 3."""

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "none"):
            raise ValueError(f"norm is {self.norm!r}; valid: batch, none")


DEFAULT = Dialect()
TORCHVISION = Dialect(eps=1e-3, ceil_pools=True, last_pool_size=2, adaptive_auxiliary=True)  # its googlenet
CADENE = Dialect(conv_bias=True, ceil_pools=True)  # bninception of pretrained-models.pytorch


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

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps, momentum=0.0)

    @property
    def recalibrating(self) -> bool:
        """Whether a forward pass in training mode is to update the running statistics."""
        return self.momentum is None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.recalibrating:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm (unless the dialect has none), ReLU; the padding keeps the grid at stride 1.

    Shapes: (N, `in_channels`, H, W) to (N, `out_channels`, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dialect: Dialect = DEFAULT
    ) -> None:
        bias = dialect.conv_bias or dialect.norm == "none"
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        norms = [BatchNorm2d(out_channels, dialect.eps)] if dialect.norm == "batch" else []
        super().__init__(conv, *norms, nn.ReLU(inplace=True))

    @property
    def conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> BatchNorm2d | None:
        return cast(BatchNorm2d, self[1]) if len(self) == 3 else None


def halving_pool(dialect: Dialect, kernel_size: int = 3) -> nn.MaxPool2d:
    """Max-pool of stride 2, from a grid of even side to one of half the side."""
    if dialect.ceil_pools:
        return nn.MaxPool2d(kernel_size, stride=2, ceil_mode=True)
    return nn.MaxPool2d(kernel_size, stride=2, padding=(kernel_size - 1) // 2)


def initialize(module: nn.Module, dialect: Dialect = DEFAULT) -> None:
    """Random weights for every convolution and linear layer in `module`, each followed by a ReLU.

    With batch norm He initialisation (arXiv 1502.01852) and biases 0. Without, what Caffe trained GoogLeNet from:
    uniform with variance 1 / fan-in and biases 0.2. It draws from torch's global generator: seed that first.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if dialect.norm == "none":
            # From He's weights it learns as well, but bears less: on 128 images, with SGD at rate 0.03 and width 0.25,
            # 28 % were recognised after 175 steps, from these 40 %.
            _initialize_as_caffe(layer, bias=0.2)
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialize_classifier(layer: nn.Linear, dialect: Dialect = DEFAULT) -> None:
    """Random weights that make the first logits nearly equal; see `initialize` for the generator."""
    if dialect.norm == "none":
        _initialize_as_caffe(layer, bias=0.0)
    else:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def _initialize_as_caffe(layer: nn.Conv2d | nn.Linear, bias: float) -> None:
    bound = math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)


def num_parameters(model: nn.Module) -> int:
    """How many trained numbers the model has; batch-norm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
