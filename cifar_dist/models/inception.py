"""The Inception module, driven by one row of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.layers import DEFAULT, ConvNormAct, Dialect, halving_pool, scaled

ThirdBranch = Literal["5x5", "double3x3", "3x3"]
KERNELS: dict[ThirdBranch, tuple[int, ...]] = {"5x5": (5,), "double3x3": (3, 3), "3x3": (3,)}


class Row(NamedTuple):
    """One line of a paper's table: output channels of each convolution of a module."""

    conv1x1: int
    """0: no such branch."""
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    """Of every convolution behind the reduction, where there are two."""
    pool_projection: int
    """0: the pool's output as it is."""
    pool: Literal["max", "avg"] = "max"
    stride: int = 1
    """2 in the last convolution of the middle branches and in the pool."""

    def at_width(self, width: float) -> Row:
        *_, pool, stride = self
        one, reduce3, three, reduce5, five, projection = (scaled(n, width) if n else 0 for n in self[:6])
        return Row(one, reduce3, three, reduce5, five, projection, pool, stride)

    def out_channels(self, in_channels: int) -> int:
        return self.conv1x1 + self.conv3x3 + self.conv5x5 + (self.pool_projection or in_channels)


Rows = Mapping[str, Row | None]
"""By name, in order; None is a max-pool between two stages."""


class Inception(nn.Module):
    """Four branches on one input, concatenated by channel (arXiv 1409.4842, figure 2b; 1502.03167, appendix).

    `branch5x5` is named after its field of view, which two 3x3 convolutions have as well.

    Args:
        in_channels: channels of the input.
        row: channels of the branches, not scaled any more.
        third: the convolutions of `branch5x5`.
        merge_1x1: in training, run the 1x1 convolutions on the input as one.
        dialect: see `Dialect`.

    Shapes: (N, C, H, W) to (N, `out_channels`, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, row: Row, third: ThirdBranch, merge_1x1: bool = False, dialect: Dialect = DEFAULT
    ) -> None:
        super().__init__()

        def branch(reduced: int, channels: int, kernels: tuple[int, ...]) -> nn.Sequential:
            layers = [ConvNormAct(in_channels, reduced, 1, dialect=dialect)]
            for k, kernel in enumerate(kernels, 1):
                stride = row.stride if k == len(kernels) else 1
                layers.append(ConvNormAct(reduced if k == 1 else channels, channels, kernel, stride, dialect))
            return nn.Sequential(*layers)

        self.branch1x1 = ConvNormAct(in_channels, row.conv1x1, 1, dialect=dialect) if row.conv1x1 else None
        self.branch3x3 = branch(row.reduce3x3, row.conv3x3, (3,))
        self.branch5x5 = branch(row.reduce5x5, row.conv5x5, KERNELS[third])
        self.branch_pool = nn.Sequential(_pool(row, dialect))
        if row.pool_projection:
            self.branch_pool.append(ConvNormAct(in_channels, row.pool_projection, 1, dialect=dialect))
        self.merge_1x1 = merge_1x1
        # Average pooling and a 1x1 convolution commute, but not with a bias: the zeros around the grid have none.
        unbiased = not dialect.conv_bias and dialect.norm == "batch"
        self._projection_joins = row.pool == "avg" and row.pool_projection > 0 and unbiased
        self.out_channels = row.out_channels(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = cast(ConvNormAct, self.branch3x3[0]).norm
        # Whatever form trained, statistics and scores come from the plain one, and so are the same to the bit.
        if self.merge_1x1 and self.training and not (norm and norm.recalibrating):
            return self._forward_merged(x)
        return torch.cat([branch(x) for branch in self.children()], dim=1)

    def _forward_merged(self, x: Tensor) -> Tensor:
        readers = [] if self.branch1x1 is None else [self.branch1x1]
        readers += [cast(ConvNormAct, self.branch3x3[0]), cast(ConvNormAct, self.branch5x5[0])]
        sizes = [reader.conv.out_channels for reader in readers]
        if self._projection_joins:
            pool, projection = self.branch_pool[0], cast(ConvNormAct, self.branch_pool[1])
            raw = _convolve(x, [*readers, projection])
            raw, projected = raw.split_with_sizes([sum(sizes), projection.conv.out_channels], dim=1)
            # What follows a split would copy its share for itself, in both directions: one dense copy costs less.
            raw, pooled = raw.clone(), _norm_act(pool(projected.clone()), [projection])
        else:
            raw = _convolve(x, readers)
            pooled = self.branch_pool(x)
        *first, reduced3x3, reduced5x5 = _norm_act(raw, readers).split_with_sizes(sizes, dim=1)
        reduced3x3, reduced5x5 = reduced3x3.clone(), reduced5x5.clone()
        for layer in list(self.branch3x3)[1:]:
            reduced3x3 = layer(reduced3x3)
        for layer in list(self.branch5x5)[1:]:
            reduced5x5 = layer(reduced5x5)
        return torch.cat((*first, reduced3x3, reduced5x5, pooled), dim=1)


def _pool(row: Row, dialect: Dialect) -> nn.Module:
    if row.stride == 2:
        return halving_pool(dialect)
    return nn.AvgPool2d(3, stride=1, padding=1) if row.pool == "avg" else nn.MaxPool2d(3, stride=1, padding=1)


def _convolve(x: Tensor, layers: Iterable[ConvNormAct]) -> Tensor:
    """The 1x1 convolutions of all `layers` as one, their outputs side by side."""
    convs = [layer.conv for layer in layers]
    biases = [conv.bias for conv in convs if conv.bias is not None]
    return F.conv2d(x, torch.cat([conv.weight for conv in convs]), torch.cat(biases) if biases else None)


def _norm_act(x: Tensor, layers: Iterable[ConvNormAct]) -> Tensor:
    """Norm and ReLU of `layers`, in training, on their convolutions' outputs side by side."""
    norms = [layer.norm for layer in layers if layer.norm is not None]
    if not norms:
        return F.relu_(x)
    weight, bias = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    return F.relu_(F.batch_norm(x, None, None, weight, bias, training=True, eps=norms[0].eps))
