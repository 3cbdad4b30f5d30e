"""The networks in numbers: how many parameters and multiply-adds they should have, and how many they do.

Everything happens on torch's meta device, where tensors have shapes and no contents, so it takes no memory and
hardly any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist.models.architectures import inception_v1, inception_v2, inception_v2_slim
from cifar_dist.models.layers import CADENE, TORCHVISION, Variant, num_parameters
from cifar_dist.models.network import Options
from cifar_dist.models.stems import GRIDS, WhiteningConv

PLAIN, BIASED = Variant(norm="none"), Variant(conv_bias=True)
IMAGENET: Options = {"stem": "imagenet", "num_classes": 1000}
HEADS: Options = {"auxiliary": True}


class Published(NamedTuple):
    """A network whose number of parameters is known from elsewhere."""

    name: str
    parameters: int
    builder: Callable[..., nn.Module]
    options: Options
    branch5x5: str = "paper"

    def build(self) -> nn.Module:
        return self.builder(self.branch5x5, **self.options)


PUBLISHED = (
    Published("V1, ImageNet, no norm (Caffe)", 6_998_552, inception_v1, {**IMAGENET, "variant": PLAIN}),
    Published("the same with auxiliary heads", 13_378_280, inception_v1, {**IMAGENET, **HEADS, "variant": PLAIN}),
    Published("V1, ImageNet, 3x3 (torchvision)", 6_624_904, inception_v1, {**IMAGENET, "variant": TORCHVISION}, "3x3"),
    Published(
        "the same with auxiliary heads", 13_004_888, inception_v1, {**IMAGENET, **HEADS, "variant": TORCHVISION}, "3x3"
    ),
    Published("V1, ImageNet", 7_005_832, inception_v1, IMAGENET),
    Published("V1", 5_871_914, inception_v1, {}),
    Published("V1, double 3x3", 6_158_346, inception_v1, {}, "double3x3"),
    Published("the same with biases (pytorch-cifar)", 6_166_250, inception_v1, {"variant": BIASED}, "double3x3"),
    Published("V2, ImageNet, biases (Cadene)", 11_295_240, inception_v2, {**IMAGENET, "variant": CADENE}),
    Published("V2, ImageNet", 11_285_224, inception_v2, IMAGENET),
    Published("V2", 10_151_306, inception_v2, {}),
    Published("V2 slim", 10_061_066, inception_v2_slim, {}),
)


class Count(NamedTuple):
    name: str
    expected: int
    computed: int

    @property
    def agrees(self) -> bool:
        return self.expected == self.computed


def parameter_counts(networks: Iterable[Published] = PUBLISHED) -> list[Count]:
    """The parameters of every published network, as they should be and as they are."""
    with torch.device("meta"):
        return [Count(network.name, network.parameters, num_parameters(network.build())) for network in networks]


def multiply_adds(model: nn.Module, side: int) -> int:
    """Multiplications (each with its addition) of convolutions and linear layers for one image of `side` x `side`.

    Counted in evaluation mode, so without auxiliary heads. `model` is on the meta device and stays as it is.
    """
    counts: list[int] = []

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        counts.append(output.numel() * module.weight[0].numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | WhiteningConv)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = model.training
    model.eval()(torch.empty(1, 3, side, side, device="meta"))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return sum(counts)


class Cost(NamedTuple):
    stem: str
    v1: int
    """Multiply-adds of a forward pass of one image, like the following."""
    v2: int
    v2_slim: int


def costs() -> list[Cost]:
    """What each stem makes the networks cost, for 10 classes."""
    table = []
    for stem in GRIDS:
        side = 224 if stem == "imagenet" else 32
        with torch.device("meta"):
            models = [build(stem=stem) for build in (inception_v1, inception_v2, inception_v2_slim)]
        table.append(Cost(stem, *(multiply_adds(model, side) for model in models)))
    return table


def report(counts: Iterable[Count], table: Iterable[Cost]) -> str:
    """Both as text, mismatches marked."""
    lines = [f"{'network':<50} {'published':>12} {'computed':>12}"]
    for count in counts:
        mark = "" if count.agrees else "   MISMATCH"
        lines.append(f"{count.name:<50} {count.expected:>12,} {count.computed:>12,}{mark}")
    lines += ["", f"{'forward multiply-adds per image, by stem':<50} {'V1':>12} {'V2':>12} {'V2 slim':>12}"]
    for stem, *numbers in table:
        lines.append(f"{stem:<50} " + " ".join(f"{number / 1e6:>10,.1f} M" for number in numbers))
    return "\n".join(lines)
