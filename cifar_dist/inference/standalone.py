"""Rebuilds an exported network from model.safetensors and config.json. The last part of the exported model.py."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.inference.variants import FromUint8, prepare
from cifar_dist.models.inception import Row
from cifar_dist.models.layers import Variant
from cifar_dist.models.network import InceptionNetwork


class MaxPool3x3(nn.MaxPool2d):
    """In place of that in cifar_dist.models.fused, without machine code."""

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1)


class AvgPool3x3(nn.AvgPool2d):
    """In place of that in cifar_dist.models.fused, without machine code."""

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1)


def norm_relu(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In place of that in cifar_dist.models.fused, without machine code."""
    return F.relu(F.batch_norm(x, None, None, scale, bias, training=True, eps=eps))


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of config.json with random weights, in eval mode, without what makes uint8 its input."""
    rows = {name: None if row is None else Row(*row) for name, row in config["rows"].items()}
    variant = Variant(**config["variant"])
    network = InceptionNetwork(rows, config["branch5x5"], stem=config["stem"], width=config["width"], variant=variant)
    return prepare(network, config["fold_batch_norm"], config["merge_1x1"])


def load(path: str | os.PathLike[str], device: str = "cpu") -> nn.Module:
    """The network of model.safetensors and the config.json beside it, in eval mode, in fp32.

    It takes normalised images (see `normalize`), or with uint8_input in config.json uint8 images (N, 3, 32, 32), and
    returns logits (N, 10) in the order of `classes` in config.json.
    """
    from safetensors.torch import load_file

    config = json.loads(Path(path).with_name("config.json").read_text(encoding="utf-8"))
    network = build(config)
    network.load_state_dict(load_file(path))
    if config["uint8_input"]:
        network = FromUint8(network, config["mean"], config["std"])
    return network.eval().requires_grad_(False).to(device)


def normalize(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """uint8 images (N, 3, 32, 32) as fp32 input of a network without uint8_input."""
    mean, std = (torch.tensor(config[key], device=images.device).view(3, 1, 1) for key in ("mean", "std"))
    return (images.float() - mean) / std
