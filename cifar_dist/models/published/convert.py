"""Weights from and to other libraries: torchvision's googlenet, and the bninception of Cadene's
pretrained-models.pytorch.

Names and layouts are translated, nothing is computed, but for the biases that Cadene's convolutions have in front of
batch norm. The networks made here keep the other library's dialect, so that they compute what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cifar_dist.models.architectures import inception_v1, inception_v2
from cifar_dist.models.layers import CADENE, TORCHVISION
from cifar_dist.models.network import InceptionNetwork

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Names:
    """What another library calls the layers of a network."""

    layers: Mapping[str, str]
    """Those outside the Inception modules, by our name."""
    module: str
    """What precedes a branch, with {} for the module's name."""
    branches: Mapping[str, str]
    conv: str
    """What follows the name of a convolution with norm, for the convolution; `norm` for the norm."""
    norm: str

    def theirs(self, ours: str) -> str:
        """The name of the parameter or buffer that we call `ours`."""
        layer, _, tensor = ours.rpartition(".")
        part = ""
        if layer not in self.layers:
            layer, _, index = layer.rpartition(".")
            part = {"0": self.conv, "1": self.norm}[index]
        if layer in self.layers:
            return f"{self.layers[layer]}{part}.{tensor}"
        _, module, branch = layer.split(".", 2)
        return f"{self.module.format(module)}{self.branches[branch]}{part}.{tensor}"


TORCHVISION_NAMES = Names(
    layers={
        "stem.0": "conv1", "stem.2": "conv2", "stem.3": "conv3", "classifier": "fc",
        "auxiliary.4a.conv": "aux1.conv", "auxiliary.4a.hidden": "aux1.fc1", "auxiliary.4a.classifier": "aux1.fc2",
        "auxiliary.4d.conv": "aux2.conv", "auxiliary.4d.hidden": "aux2.fc1", "auxiliary.4d.classifier": "aux2.fc2",
    },
    module="inception{}.",
    branches={
        "branch1x1": "branch1", "branch3x3.0": "branch2.0", "branch3x3.1": "branch2.1",
        "branch5x5.0": "branch3.0", "branch5x5.1": "branch3.1", "branch_pool.1": "branch4.1",
    },
    conv=".conv",
    norm=".bn",
)  # fmt: skip
CADENE_NAMES = Names(
    layers={
        "stem.0": "conv1_7x7_s2", "stem.2": "conv2_3x3_reduce", "stem.3": "conv2_3x3", "classifier": "last_linear",
    },
    module="inception_{}_",
    branches={
        "branch1x1": "1x1", "branch3x3.0": "3x3_reduce", "branch3x3.1": "3x3",
        "branch5x5.0": "double_3x3_reduce", "branch5x5.1": "double_3x3_1", "branch5x5.2": "double_3x3_2",
        "branch_pool.1": "pool_proj",
    },
    conv="",
    norm="_bn",
)  # fmt: skip


def from_torchvision(state_dict: StateDict) -> InceptionNetwork:
    """The network of a torchvision googlenet, with or without its auxiliary heads, for any number of classes.

    It computes what torchvision's does with transform_input=False. Torchvision's own pretrained weights go with
    transform_input=True: give such a network images that went through `transform_input`. Auxiliary logits come in the
    order 4a, 4d, in torchvision 4d, 4a (aux_logits2, aux_logits1).

    Args:
        state_dict: of `torchvision.models.googlenet`; copied, in its own dtype.

    Raises:
        ValueError: it is not one; names the first name or shape that does not fit.
    """
    auxiliary = any(name.startswith("aux") for name in state_dict)
    return _load(lambda: _googlenet(_length(state_dict, "fc.bias"), auxiliary), state_dict, TORCHVISION_NAMES)


def to_torchvision(network: InceptionNetwork) -> dict[str, Tensor]:
    """A state dict for `torchvision.models.googlenet(num_classes=..., aux_logits=...)`, sharing memory with `network`.

    Raises:
        ValueError: `network` is another one, whose weights torchvision could not take or would use otherwise.
    """
    state = network.state_dict()
    with torch.device("meta"):
        like = _googlenet(network.classifier.out_features, bool(network.auxiliary)).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if network.variant != TORCHVISION or shapes != {name: tensor.shape for name, tensor in like.items()}:
        raise ValueError(
            "the network is not torchvision's googlenet; that is inception_v1('3x3', stem='imagenet', "
            "variant=TORCHVISION) at width 1"
        )
    return {TORCHVISION_NAMES.theirs(name): tensor for name, tensor in state.items()}


def transform_input(images: Tensor) -> Tensor:
    """What torchvision's googlenet does first with transform_input=True, as for its pretrained weights.

    Args:
        images: (N, 3, H, W), normalised by the means and standard deviations of ImageNet's channels.

    Returns:
        The same images, normalised by mean 0.5 and standard deviation 0.5 of values from 0 to 1.
    """
    mean = images.new_tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = images.new_tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    return (images * std + mean - 0.5) / 0.5


def from_cadene(state_dict: StateDict) -> InceptionNetwork:
    """The network of a bninception of pretrained-models.pytorch, for any number of classes.

    Its convolutions have biases. In evaluation batch norm subtracts its running mean from them, so the network made
    here has none, and a mean that is smaller by as much.

    Args:
        state_dict: also in older forms, with norms of shape (1, C), without num_batches_tracked, or `fc` for
            `last_linear`; copied, in its own dtype. The original wants BGR images from 0 to 255, less their mean.

    Raises:
        ValueError: it is not one; names the first name or shape that does not fit.
    """
    state = {}
    for name, tensor in state_dict.items():
        current = f"last_linear.{name[3:]}" if name.startswith("fc.") else name
        state[current] = tensor.reshape(-1) if "_bn." in name and tensor.ndim == 2 else tensor
    for mean in [name for name in state if name.endswith("_bn.running_mean")]:
        layer = mean.removesuffix("_bn.running_mean")
        state.setdefault(f"{layer}_bn.num_batches_tracked", torch.tensor(0))
        if f"{layer}.bias" in state:
            state[mean] = state[mean] - state.pop(f"{layer}.bias")
    variant, classes = replace(CADENE, conv_bias=False), _length(state, "last_linear.bias")
    return _load(lambda: inception_v2(stem="imagenet", num_classes=classes, variant=variant), state, CADENE_NAMES)


def _googlenet(num_classes: int, auxiliary: bool) -> InceptionNetwork:
    return inception_v1(
        "3x3", stem="imagenet", dropout=0.2, num_classes=num_classes, auxiliary=auxiliary, variant=TORCHVISION
    )


def _length(state: StateDict, name: str) -> int:
    return len(state[name]) if name in state else 1  # any: `_load` is going to miss the name


def _load(build: Callable[[], InceptionNetwork], state: StateDict, names: Names) -> InceptionNetwork:
    """What `build` builds, with copies of the tensors of `state`, which has another library's names."""
    with torch.device("meta"):  # no random weights are drawn
        network = build()
    wanted = {names.theirs(ours): (ours, tensor.shape) for ours, tensor in network.state_dict().items()}
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"not the state dict expected: {len(missing)} names are missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unexpected)} are unexpected ({', '.join(unexpected[:3]) or 'none'})"
        )
    for name, (_, shape) in wanted.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")
    network.load_state_dict({ours: state[name].clone() for name, (ours, _) in wanted.items()}, assign=True)
    return network
