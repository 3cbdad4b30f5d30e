"""The network: stem, Inception modules from a table, classifier, and auxiliary classifiers for training."""

import copy
from typing import NamedTuple, TypedDict, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.inception import Inception, Rows
from cifar_dist.models.layers import DEFAULT, ConvNormAct, Variant, halving_pool, init_classifier, init_weights, scaled
from cifar_dist.models.stems import Stem

AUXILIARY_WEIGHT = 0.3  # of each auxiliary loss; the main loss has 1 (arXiv 1409.4842, section 5)
AUXILIARY_AFTER = ("4a", "4d")  # the modules whose outputs the auxiliary classifiers read
M = TypeVar("M", bound=nn.Module)


class Options(TypedDict, total=False):
    """Keyword arguments of `InceptionNetwork` that the functions in `architectures` pass on."""

    stem: str
    width: float
    dropout: float
    num_classes: int
    auxiliary: bool
    merge_1x1: bool
    variant: Variant


class Logits(NamedTuple):
    """Output of a network with auxiliary classifiers in training mode; each (N, num_classes)."""

    main: Tensor
    auxiliary: tuple[Tensor, ...]
    """In the order of AUXILIARY_AFTER."""


class InceptionNetwork(nn.Module):
    """Stem, Inception modules and pools, global average pool, dropout, linear.

    Args:
        rows: the network's table.
        branch5x5: key of inception.KERNELS, the same for every module.
        stem: key of stems.GRIDS.
        width: multiplies all channel counts.
        dropout: probability of zeroing a feature before the classifier.
        auxiliary: add classifiers after AUXILIARY_AFTER.
        merge_1x1: in training, compute the 1x1 convolutions on one input as one convolution.
        variant: which published implementation to reproduce.

    Shapes: normalised images (N, 3, 32, 32), or (N, 3, 224, 224) with the imagenet stem, to logits (N, num_classes);
    in training mode with auxiliary classifiers to `Logits`.
    """

    def __init__(
        self,
        rows: Rows,
        branch5x5: str,
        *,
        stem: str = "cifar",
        width: float = 1.0,
        dropout: float = 0.0,
        num_classes: int = 10,
        auxiliary: bool = False,
        merge_1x1: bool = False,
        variant: Variant = DEFAULT,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.stem = Stem(stem, width, variant)
        self.blocks = nn.ModuleDict()
        channels, outputs = self.stem.out_channels, {}
        pools = [name for name, row in rows.items() if row is None]
        for name, row in rows.items():
            if row is None:
                self.blocks[name] = halving_pool(variant, variant.last_pool_size if name == pools[-1] else 3)
            else:
                self.blocks[name] = module = Inception(channels, row.at_width(width), branch5x5, merge_1x1, variant)
                channels = outputs[name] = module.out_channels
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        init_weights(self.stem, variant)
        init_weights(self.blocks, variant)
        init_classifier(self.classifier, variant)
        # Last, so that the other layers get the same random weights with and without auxiliary classifiers.
        self.auxiliary = nn.ModuleDict()
        for name in AUXILIARY_AFTER if auxiliary else ():
            self.auxiliary[name] = AuxiliaryHead(outputs[name], self.stem.grid // 2, num_classes, width, variant)

    def forward(self, images: Tensor) -> Tensor | Logits:
        x = self.stem(images)
        auxiliary = []
        for name, block in self.blocks.items():
            x = block(x)
            if self.training and name in self.auxiliary:
                auxiliary.append(self.auxiliary[name](x))
        # Not mean(dim=(2, 3)): its gradient is NCHW, and would make the backward pass leave channels-last.
        features = x.permute(0, 2, 3, 1).mean(dim=(1, 2))
        logits: Tensor = self.classifier(self.dropout(features))
        return Logits(logits, tuple(auxiliary)) if auxiliary else logits


class AuxiliaryHead(nn.Module):
    """Average pool, 1x1 convolution to 128, linear to 1024, dropout 0.7, linear (arXiv 1409.4842, section 5).

    Shapes: (N, `in_channels`, `grid`, `grid`) to logits (N, `num_classes`).
    """

    def __init__(self, in_channels: int, grid: int, num_classes: int, width: float, variant: Variant) -> None:
        super().__init__()
        self.pool: nn.Module = nn.AvgPool2d(5, stride=3)
        pooled = (grid - 5) // 3 + 1
        if variant.adaptive_auxiliary:
            self.pool, pooled = nn.AdaptiveAvgPool2d(4), 4
        channels, features = scaled(128, width), scaled(1024, width)
        self.conv = ConvNormAct(in_channels, channels, 1, variant=variant)
        self.hidden = nn.Linear(channels * pooled**2, features)
        self.dropout = nn.Dropout(0.7)
        self.classifier = nn.Linear(features, num_classes)
        init_weights(self.conv, variant)
        init_weights(self.hidden, variant)
        init_classifier(self.classifier, variant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(F.relu(self.hidden(x))))
        return logits


def without_auxiliary(model: M) -> M:
    """`model` without its auxiliary classifiers, for evaluation, averaging and export.

    Shares all parameters, buffers and layers with `model`, so train() and eval() of one affect both. A network without
    auxiliary classifiers is returned as it is.
    """
    if not model._modules.get("auxiliary"):
        return model
    main = copy.copy(model)
    main._modules = {**model._modules, "auxiliary": nn.ModuleDict()}
    return main


def main_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict without the auxiliary classifiers."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary.")}
