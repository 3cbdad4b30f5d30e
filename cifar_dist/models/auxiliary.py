"""The auxiliary classifiers of GoogLeNet (arXiv 1409.4842, section 5), which exist in training only."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.layers import ConvNormAct, Dialect, initialize, initialize_classifier, scaled

AUXILIARY_WEIGHT = 0.3
"""What each auxiliary loss counts beside the main one."""
AFTER = ("4a", "4d")
"""The modules whose outputs the heads read."""
M = TypeVar("M", bound=nn.Module)


class Logits(NamedTuple):
    """What a network with auxiliary heads returns in training mode; each is (N, num_classes)."""

    main: Tensor
    auxiliary: tuple[Tensor, ...]
    """In the order of `AFTER`."""


class AuxiliaryHead(nn.Module):
    """Average pool, 1x1 convolution to 128, fully connected to 1024, dropout 0.7, linear.

    Shapes: (N, `in_channels`, `grid`, `grid`) to logits (N, `num_classes`).
    """

    def __init__(self, in_channels: int, grid: int, num_classes: int, width: float, dialect: Dialect) -> None:
        super().__init__()
        self.pool: nn.Module = nn.AvgPool2d(5, stride=3)
        pooled = (grid - 5) // 3 + 1
        if dialect.adaptive_auxiliary:
            self.pool, pooled = nn.AdaptiveAvgPool2d(4), 4
        channels, features = scaled(128, width), scaled(1024, width)
        self.conv = ConvNormAct(in_channels, channels, 1, dialect=dialect)
        self.hidden = nn.Linear(channels * pooled**2, features)
        self.dropout = nn.Dropout(0.7)
        self.classifier = nn.Linear(features, num_classes)
        initialize(self.conv, dialect)
        initialize(self.hidden, dialect)
        initialize_classifier(self.classifier, dialect)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(F.relu(self.hidden(x))))
        return logits


def without_auxiliary(model: M) -> M:
    """The same network without its auxiliary heads: for evaluation, averages of weights, and export.

    All parameters, buffers and layers are shared with `model`, so what trains one trains the other; train() and
    eval() of either set the shared layers. A network without heads is returned as it is.
    """
    if not model._modules.get("auxiliary"):
        return model
    bare = copy.copy(model)
    bare._modules = {**model._modules, "auxiliary": nn.ModuleDict()}
    return bare


def main_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict without the entries of auxiliary heads."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary.")}
