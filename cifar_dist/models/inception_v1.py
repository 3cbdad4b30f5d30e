"""Inception V1, that is GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), with batch norm, for 32x32 images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist.models.layers import ConvNormAct, Stem, initialize, scaled


class Row(NamedTuple):
    """One line of the paper's table 1: output channels of each convolution of a module."""

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    pool_projection: int


STEM_CHANNELS = 192
POOL = None  # a max-pool between two stages
ROWS: dict[str, Row | None] = {
    "3a": Row(64, 96, 128, 16, 32, 32),
    "3b": Row(128, 128, 192, 32, 96, 64),
    "pool3": POOL,
    "4a": Row(192, 96, 208, 16, 48, 64),
    "4b": Row(160, 112, 224, 24, 64, 64),
    "4c": Row(128, 128, 256, 24, 64, 64),
    "4d": Row(112, 144, 288, 32, 64, 64),
    "4e": Row(256, 160, 320, 32, 128, 128),
    "pool4": POOL,
    "5a": Row(256, 160, 320, 32, 128, 128),
    "5b": Row(384, 192, 384, 48, 128, 128),
}


class Inception(nn.Module):
    """Four branches on one input, concatenated by channel (figure 2b of the paper).

    Shapes: (N, C, H, W) to (N, `out_channels`, H, W).
    """

    def __init__(self, in_channels: int, row: Row, width: float) -> None:
        super().__init__()
        row = Row(*(scaled(channels, width) for channels in row))
        self.branch1x1 = ConvNormAct(in_channels, row.conv1x1, 1)
        self.branch3x3 = nn.Sequential(
            ConvNormAct(in_channels, row.reduce3x3, 1), ConvNormAct(row.reduce3x3, row.conv3x3, 3)
        )
        self.branch5x5 = nn.Sequential(
            ConvNormAct(in_channels, row.reduce5x5, 1), ConvNormAct(row.reduce5x5, row.conv5x5, 5)
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), ConvNormAct(in_channels, row.pool_projection, 1)
        )
        self.out_channels = row.conv1x1 + row.conv3x3 + row.conv5x5 + row.pool_projection

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)), dim=1)


class InceptionV1(nn.Module):
    """The whole network: stem, nine Inception modules, global average pool, dropout, linear.

    Args:
        stem: cifar, pooled or strided.
        width: multiplies all channel counts.
        dropout: probability of zeroing a feature before the classifier.
        num_classes: length of a row of logits.

    Shapes: images (N, 3, 32, 32), normalised, to logits (N, num_classes).
    """

    def __init__(self, stem: str = "cifar", width: float = 1.0, dropout: float = 0.0, num_classes: int = 10) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.stem = Stem(stem, channels, width)
        self.blocks = nn.ModuleDict()
        for name, row in ROWS.items():
            if row is POOL:
                self.blocks[name] = nn.MaxPool2d(3, stride=2, padding=1)
            else:
                self.blocks[name] = module = Inception(channels, row, width)
                channels = module.out_channels
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks.values():
            x = block(x)
        logits: Tensor = self.classifier(self.dropout(x.mean(dim=(2, 3))))
        return logits
