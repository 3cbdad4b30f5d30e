"""The Inception module: four branches, with the channels of one row of a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.fused import AvgPool3x3, MaxPool3x3, norm_relu
from cifar_dist.models.layers import DEFAULT, ConvNormAct, Variant, halving_pool, scaled

KERNELS = {"paper": (5,), "5x5": (5,), "double3x3": (3, 3), "3x3": (3,)}
"""Kernel sizes of `branch5x5` behind its 1x1 reduction, by name of the setting model.branch5x5."""


class Row(NamedTuple):
    """Output channels of the convolutions of one module, as in a line of a paper's table."""

    conv1x1: int
    """0: the module has no 1x1 branch."""
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    """Of both convolutions, if `branch5x5` has two."""
    pool_projection: int
    """0: no projection."""
    pool: Literal["max", "avg"] = "max"
    stride: int = 1
    """Of the pool and of the last convolution of branch3x3 and branch5x5."""

    def at_width(self, width: float) -> "Row":
        *_, pool, stride = self
        one, reduce3, three, reduce5, five, projection = (scaled(n, width) if n else 0 for n in self[:6])
        return Row(one, reduce3, three, reduce5, five, projection, pool, stride)

    def out_channels(self, in_channels: int) -> int:
        return self.conv1x1 + self.conv3x3 + self.conv5x5 + (self.pool_projection or in_channels)


Rows = Mapping[str, Row | None]
"""Modules by name, in order; None is a max-pool between two stages."""


class Inception(nn.Module):
    """Four branches on one input, concatenated by channel (arXiv 1409.4842, figure 2b; 1502.03167, appendix).

    Args:
        in_channels: channels of the input.
        row: channels of the branches, already scaled by the width.
        branch5x5: key of KERNELS; the branch has its name from its field of view, also with two 3x3 convolutions.
        merge_1x1: in training, compute the 1x1 convolutions on the input as one convolution.
        variant: which published implementation to reproduce.

    Shapes: (N, C, H, W) to (N, `out_channels`, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, row: Row, branch5x5: str, merge_1x1: bool = False, variant: Variant = DEFAULT
    ) -> None:
        super().__init__()

        def branch(reduced: int, channels: int, kernels: tuple[int, ...]) -> nn.Sequential:
            layers = [ConvNormAct(in_channels, reduced, 1, variant=variant)]
            for k, kernel in enumerate(kernels, 1):
                stride = row.stride if k == len(kernels) else 1
                layers.append(ConvNormAct(reduced if k == 1 else channels, channels, kernel, stride, variant))
            return nn.Sequential(*layers)

        self.branch1x1 = ConvNormAct(in_channels, row.conv1x1, 1, variant=variant) if row.conv1x1 else None
        self.branch3x3 = branch(row.reduce3x3, row.conv3x3, (3,))
        self.branch5x5 = branch(row.reduce5x5, row.conv5x5, KERNELS[branch5x5])
        self.branch_pool = nn.Sequential(_pool(row, variant))
        if row.pool_projection:
            self.branch_pool.append(ConvNormAct(in_channels, row.pool_projection, 1, variant=variant))
        self.merge_1x1 = merge_1x1
        # Average pooling and a 1x1 convolution commute, unless it has a bias, which the pool's zero padding lacks.
        unbiased = not variant.conv_bias and variant.norm == "batch"
        self._merge_projection = row.pool == "avg" and row.pool_projection > 0 and unbiased
        self.out_channels = row.out_channels(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = cast(ConvNormAct, self.branch3x3[0]).norm
        # Recalibration and evaluation always use the unmerged convolutions, so scores do not depend on merge_1x1.
        if self.merge_1x1 and self.training and not (norm and norm.recalibrating):
            return self._forward_merged(x)
        return _concatenate([branch(x) for branch in self.children()])

    def _forward_merged(self, x: Tensor) -> Tensor:
        """In training mode: the 1x1 convolutions on `x` as one, uncompiled also the norms of the branches' outputs."""
        first = [] if self.branch1x1 is None else [self.branch1x1]
        branches = [cast(list[ConvNormAct], list(branch)) for branch in (self.branch3x3, self.branch5x5)]
        pool, projections = self.branch_pool[0], cast(list[ConvNormAct], list(self.branch_pool[1:]))
        reductions = [branch[0] for branch in branches]
        sizes = [layer.conv.out_channels for layer in (*first, *reductions)]
        # Below, layers after a split would copy their strided input, forward and backward; one dense copy costs less.
        if self._merge_projection:
            raw = _convolve(x, [*first, *reductions, *projections])
            raw, projected = _split(raw, [sum(sizes), projections[0].conv.out_channels])
            pooled = pool(projected.clone())
        else:
            raw, pooled = _convolve(x, [*first, *reductions]), pool(x)
            pooled = projections[0].conv(pooled) if projections else pooled
        compiled = torch.compiler.is_compiling()  # inductor fuses a norm with its neighbours, but not a concatenation
        if compiled:
            raw = raw.clone() if self._merge_projection else raw
            *before, reduced3x3, reduced5x5 = _split(_norm_act(raw, [*first, *reductions]), sizes)
        else:
            *before, both = _split(raw, [*sizes[:-2], sum(sizes[-2:])])
            reduced3x3, reduced5x5 = _split(_norm_act(both.clone(), reductions), sizes[-2:])
        outputs = list(before)  # to the compiler of torch 2.11, `before` is a tuple
        for reduced, (_, *inner, last) in zip((reduced3x3, reduced5x5), branches, strict=True):
            hidden = reduced.clone()
            for layer in inner:
                hidden = layer(hidden)
            outputs.append(last.conv(hidden))
        layers = [*first, *(branch[-1] for branch in branches), *projections]
        outputs.append(pooled)
        if not compiled:
            joined = _norm_act(_concatenate(outputs[: len(layers)]), layers)
            return joined if projections else _concatenate([joined, pooled])
        for k in range(len(first), len(layers)):
            outputs[k] = _norm_act(outputs[k], [layers[k]])
        return _concatenate(outputs)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """By channel. The last part decides the memory format, as it is the output of a layer."""
    if not _is_compiled_channels_last(parts[-1]):
        return torch.cat(parts, dim=1)
    return torch.cat([part.permute(0, 2, 3, 1) for part in parts], dim=3).permute(0, 3, 1, 2)


def _split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `_concatenate`: views."""
    if not _is_compiled_channels_last(x):
        return list(x.split_with_sizes(sizes, dim=1))
    return [part.permute(0, 3, 1, 2) for part in x.permute(0, 2, 3, 1).split_with_sizes(sizes, dim=3)]


def _is_compiled_channels_last(x: Tensor) -> bool:
    """Whether to handle `x` as (N, H, W, C). For (N, C, H, W) inductor of torch 2.15 may write planes."""
    return torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last)


def _pool(row: Row, variant: Variant) -> nn.Module:
    if row.stride == 2:
        return halving_pool(variant)
    return AvgPool3x3() if row.pool == "avg" else MaxPool3x3()


def _convolve(x: Tensor, layers: Iterable[ConvNormAct]) -> Tensor:
    """The 1x1 convolutions of `layers` as one, outputs concatenated by channel."""
    convs = [layer.conv for layer in layers]
    biases = [conv.bias for conv in convs if conv.bias is not None]
    return F.conv2d(x, torch.cat([conv.weight for conv in convs]), torch.cat(biases) if biases else None)


def _norm_act(x: Tensor, layers: Iterable[ConvNormAct]) -> Tensor:
    """Norm and ReLU of `layers`, in training mode, on the concatenated outputs of their convolutions."""
    norms = [layer.norm for layer in layers if layer.norm is not None]
    if not norms:
        return F.relu_(x)
    weight, bias = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    return norm_relu(x, weight, bias, norms[0].eps)
