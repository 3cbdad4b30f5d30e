"""Inception V1, that is GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), by default with batch norm."""

from __future__ import annotations

from typing import Unpack

from cifar_dist.models.inception import Row, Rows, ThirdBranch
from cifar_dist.models.network import InceptionNetwork, Options

ROWS: Rows = {
    "3a": Row(64, 96, 128, 16, 32, 32),
    "3b": Row(128, 128, 192, 32, 96, 64),
    "pool3": None,
    "4a": Row(192, 96, 208, 16, 48, 64),
    "4b": Row(160, 112, 224, 24, 64, 64),
    "4c": Row(128, 128, 256, 24, 64, 64),
    "4d": Row(112, 144, 288, 32, 64, 64),
    "4e": Row(256, 160, 320, 32, 128, 128),
    "pool4": None,
    "5a": Row(256, 160, 320, 32, 128, 128),
    "5b": Row(384, 192, 384, 48, 128, 128),
}
THIRD_BRANCHES: dict[str, ThirdBranch] = {"paper": "5x5", "5x5": "5x5", "double3x3": "double3x3", "3x3": "3x3"}


def inception_v1(branch5x5: str = "paper", **options: Unpack[Options]) -> InceptionNetwork:
    """Table 1 of the paper; `branch5x5` is paper, 5x5, double3x3 or 3x3, the rest as `InceptionNetwork` says.

    With norm none and the imagenet stem it is the network of 2014, two local response normalisations included.
    """
    if branch5x5 not in THIRD_BRANCHES:
        raise ValueError(f"branch5x5 is {branch5x5!r}; valid: {', '.join(THIRD_BRANCHES)}")
    return InceptionNetwork(ROWS, THIRD_BRANCHES[branch5x5], **options)
