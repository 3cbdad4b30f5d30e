"""Inception V2, that is BN-Inception (Ioffe and Szegedy 2015, arXiv 1502.03167, appendix).

The paper contradicts itself: its table prints 576, 576 and 1024 output channels for 4c, 4d and 4e, while the branches
that it prints add up to 608, 608 and 1056. `inception_v2` keeps the branches, `inception_v2_slim` gets the printed
sums by projecting the pool of 4c and 4d to 96, as TF-slim does.
"""

from __future__ import annotations

from typing import Unpack

from cifar_dist.models.inception import Row, Rows
from cifar_dist.models.layers import DEFAULT
from cifar_dist.models.network import InceptionNetwork, Options

ROWS: Rows = {
    "3a": Row(64, 64, 64, 64, 96, 32, "avg"),
    "3b": Row(64, 64, 96, 64, 96, 64, "avg"),
    "3c": Row(0, 128, 160, 64, 96, 0, "max", stride=2),
    "4a": Row(224, 64, 96, 96, 128, 128, "avg"),
    "4b": Row(192, 96, 128, 96, 128, 128, "avg"),
    "4c": Row(160, 128, 160, 128, 160, 128, "avg"),
    "4d": Row(96, 128, 192, 160, 192, 128, "avg"),
    "4e": Row(0, 128, 192, 192, 256, 0, "max", stride=2),
    "5a": Row(352, 192, 320, 160, 224, 128, "avg"),
    "5b": Row(352, 192, 320, 192, 224, 128, "max"),
}
SLIM_ROWS: Rows = {
    **ROWS,
    "4c": Row(160, 128, 160, 128, 160, 96, "avg"),
    "4d": Row(96, 128, 192, 160, 192, 96, "avg"),
}


def inception_v2(branch5x5: str = "paper", **options: Unpack[Options]) -> InceptionNetwork:
    """With the branches as printed; `branch5x5` can only be paper, the rest is as `InceptionNetwork` says."""
    return _build(ROWS, branch5x5, options)


def inception_v2_slim(branch5x5: str = "paper", **options: Unpack[Options]) -> InceptionNetwork:
    """With the sums as printed; `branch5x5` can only be paper, the rest is as `InceptionNetwork` says."""
    return _build(SLIM_ROWS, branch5x5, options)


def _build(rows: Rows, branch5x5: str, options: Options) -> InceptionNetwork:
    if branch5x5 != "paper":
        raise ValueError(f"branch5x5 is {branch5x5!r}, but Inception V2 has two 3x3 there; use paper, or Inception V1")
    if options.get("dialect", DEFAULT).norm == "none":
        raise ValueError("norm is 'none', but Inception V2 is built on batch norm; use batch, or Inception V1")
    return InceptionNetwork(rows, "double3x3", **options)
