"""Parameter counts against the literature: `python -m cifar_dist.models`; exits with 1 if one differs.

Networks are built on torch's meta device, whose tensors have shapes but no memory.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist import cli, errors
from cifar_dist.models.architectures import inception_v1, inception_v2, inception_v2_slim
from cifar_dist.models.layers import CADENE, TORCHVISION, Variant, num_parameters
from cifar_dist.models.stems import GRIDS
from cifar_dist.process import run_and_exit

PLAIN, BIASED = Variant(norm="none"), Variant(conv_bias=True)
V1 = partial(inception_v1, stem="imagenet", num_classes=1000)
V2 = partial(inception_v2, stem="imagenet", num_classes=1000)
Network = tuple[str, int, Callable[[], nn.Module]]  # name, number of parameters according to others, constructor
PUBLISHED: tuple[Network, ...] = (
    ("V1, ImageNet, no norm (Caffe)", 6_998_552, partial(V1, variant=PLAIN)),
    ("the same with auxiliary heads", 13_378_280, partial(V1, variant=PLAIN, auxiliary=True)),
    ("V1, ImageNet, 3x3 (torchvision)", 6_624_904, partial(V1, "3x3", variant=TORCHVISION)),
    ("the same with auxiliary heads", 13_004_888, partial(V1, "3x3", variant=TORCHVISION, auxiliary=True)),
    ("V1, ImageNet", 7_005_832, V1),
    ("V1", 5_871_914, inception_v1),
    ("V1, double 3x3", 6_158_346, partial(inception_v1, "double3x3")),
    ("the same with biases (pytorch-cifar)", 6_166_250, partial(inception_v1, "double3x3", variant=BIASED)),
    ("V2, ImageNet, biases (Cadene)", 11_295_240, partial(V2, variant=CADENE)),
    ("V2, ImageNet", 11_285_224, V2),
    ("V2", 10_151_306, inception_v2),
    ("V2 slim", 10_061_066, inception_v2_slim),
)


def multiply_adds(model: nn.Module, side: int) -> int:
    """Multiplications (each with its addition) of convolutions and linear layers for one image of `side` x `side`.

    `model` is on the meta device, in evaluation mode if auxiliary heads are not to be counted.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        model(torch.empty(1, 3, side, side, device="meta"))
    return int(operations.get_total_flops()) // 2


def costs() -> dict[str, list[int]]:
    """By stem, the multiply-adds of a forward pass of one image in V1, V2 and V2 slim, for 10 classes."""
    table = {}
    for stem in GRIDS:
        with torch.device("meta"):
            models = [build(stem=stem).eval() for build in (inception_v1, inception_v2, inception_v2_slim)]
        table[stem] = [multiply_adds(model, 224 if stem == "imagenet" else 32) for model in models]
    return table


def main(networks: Sequence[Network] = PUBLISHED) -> int:
    print(f"{'network':<50} {'published':>12} {'computed':>12}")
    mismatches = 0
    for name, published, build in networks:
        with torch.device("meta"):
            computed = num_parameters(build())
        mismatches += computed != published
        print(f"{name:<50} {published:>12,} {computed:>12,}" + "   MISMATCH" * (computed != published))
    print(f"\n{'forward multiply-adds per image, by stem':<50} {'V1':>12} {'V2':>12} {'V2 slim':>12}")
    for stem, numbers in costs().items():
        print(f"{stem:<50} " + " ".join(f"{number / 1e6:>10,.1f} M" for number in numbers))
    return int(mismatches > 0)


@dataclass(frozen=True)
class NoArguments:
    pass


def command() -> None:
    with errors.exit_on_error():
        text = "Parameter counts against the literature. Example: python -m cifar_dist.models"
        cli.parse(NoArguments, sys.argv[1:], "models", description=text)
    raise SystemExit(main())


if __name__ == "__main__":
    run_and_exit(command)
