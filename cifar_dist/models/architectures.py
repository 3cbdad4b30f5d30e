"""The networks' tables, and the network that a configuration names.

Inception V1 is GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842, table 1), here with batch norm unless `model.norm` is
none. Inception V2 is BN-Inception (Ioffe and Szegedy 2015, arXiv 1502.03167, appendix), whose table contradicts itself:
it prints 576, 576 and 1024 output channels for 4c, 4d and 4e, but the branches that it prints sum to 608, 608 and 1056.
`inception_v2` has the branches as printed; `inception_v2_slim` has the sums as printed, because it projects the pool of
4c and 4d to 96 channels, as TF-slim does.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Unpack

from torch import nn

from cifar_dist.config import NUM_CLASSES, ModelConfig
from cifar_dist.models.inception import KERNELS, Row, Rows
from cifar_dist.models.layers import CADENE, DEFAULT, TORCHVISION
from cifar_dist.models.network import InceptionNetwork, Options
from cifar_dist.models.own import Network, own_network

V1: Rows = {
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
V2: Rows = {
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
V2_SLIM: Rows = {
    **V2,
    "4c": Row(160, 128, 160, 128, 160, 96, "avg"),
    "4d": Row(96, 128, 192, 160, 192, 96, "avg"),
}


def inception_v1(branch5x5: str = "paper", **options: Unpack[Options]) -> InceptionNetwork:
    """GoogLeNet; `branch5x5` is a key of inception.KERNELS. With norm none and the imagenet stem: the network of 2014,
    including its two local response normalisations.

    Raises:
        ValueError: an unknown branch5x5 or stem.
    """
    if branch5x5 not in KERNELS:
        raise ValueError(f"branch5x5 is {branch5x5!r}; valid: {', '.join(KERNELS)}")
    return InceptionNetwork(V1, branch5x5, **options)


def inception_v2(branch5x5: str = "paper", *, rows: Rows = V2, **options: Unpack[Options]) -> InceptionNetwork:
    """BN-Inception with the branches as printed; with `rows` V2_SLIM with the sums as printed.

    Raises:
        ValueError: branch5x5 is not paper, or norm is none.
    """
    if branch5x5 != "paper":
        raise ValueError(f"branch5x5 is {branch5x5!r}, but Inception V2 has two 3x3 there; use paper, or Inception V1")
    if options.get("variant", DEFAULT).norm == "none":
        raise ValueError("norm is 'none', but Inception V2 is built on batch norm; use batch, or Inception V1")
    return InceptionNetwork(rows, "double3x3", **options)


inception_v2_slim = partial(inception_v2, rows=V2_SLIM)
MODELS: dict[str, Callable[..., InceptionNetwork]] = {
    "inception_v1": inception_v1,
    "inception_v2": inception_v2,
    "inception_v2_slim": inception_v2_slim,
}


# Without Cadene's biases before batch norm, which the converter merges into its means.
VARIANTS = {"default": DEFAULT, "torchvision": TORCHVISION, "cadene": replace(CADENE, conv_bias=False)}


def create_model(config: ModelConfig, num_classes: int = NUM_CLASSES) -> nn.Module:
    """The network of `config` on the CPU, with random weights from torch's global generator.

    Raises:
        UserError: it is an own network that cannot be used.
    """
    build: Network = built_in_network if config.name in MODELS else own_network
    return build(config, num_classes)


def built_in_network(config: ModelConfig, num_classes: int) -> InceptionNetwork:
    return MODELS[config.name](
        config.branch5x5,
        stem=config.stem,
        width=config.width,
        dropout=config.dropout,
        num_classes=num_classes,
        auxiliary=config.auxiliary,
        merge_1x1=config.merge_1x1 != "off",
        variant=replace(VARIANTS[config.variant], norm=config.norm),
    )
