"""Weights from and to other libraries: torchvision's googlenet, and the bninception of Cadene's
pretrained-models.pytorch.

Names and layouts are translated, and what DistributedDataParallel, torch.compile and AveragedModel add to them is left
out; only the biases that Cadene's convolutions have before batch norm are merged into its
means. The networks have the other library's `Variant`, so they compute the same as its own.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cifar_dist.models.architectures import inception_v1, inception_v2
from cifar_dist.models.layers import CADENE, TORCHVISION
from cifar_dist.models.network import InceptionNetwork

StateDict = Mapping[str, Tensor]
Names = tuple[tuple[str, str], ...]  # regular expressions and what re.sub puts in their place, one after another

# In ConvNormAct, 0 is the convolution and 1 the norm.
TORCHVISION_NAMES: Names = (
    (r"^stem\.0\.", "conv1."), (r"^stem\.2\.", "conv2."), (r"^stem\.3\.", "conv3."), (r"^classifier\.", "fc."),
    (r"^auxiliary\.4a\.", "aux1."), (r"^auxiliary\.4d\.", "aux2."), (r"\.hidden\.", ".fc1."),
    (r"\.classifier\.", ".fc2."), (r"^blocks\.(..)\.", r"inception\1."), (r"branch1x1\.", "branch1."),
    (r"branch3x3\.", "branch2."), (r"branch5x5\.", "branch3."), (r"branch_pool\.", "branch4."),
    (r"\.0\.(\w+)$", r".conv.\1"), (r"\.1\.(\w+)$", r".bn.\1"),
)  # fmt: skip
CADENE_NAMES: Names = (
    (r"^stem\.0\.", "conv1_7x7_s2."), (r"^stem\.2\.", "conv2_3x3_reduce."), (r"^stem\.3\.", "conv2_3x3."),
    (r"^classifier\.", "last_linear."), (r"^blocks\.(..)\.", r"inception_\1_"), (r"branch1x1\.", "1x1."),
    (r"branch3x3\.0\.", "3x3_reduce."), (r"branch3x3\.1\.", "3x3."), (r"branch5x5\.0\.", "double_3x3_reduce."),
    (r"branch5x5\.", "double_3x3_"), (r"branch_pool\.1\.", "pool_proj."),
    (r"\.0\.(\w+)$", r".\1"), (r"\.1\.(\w+)$", r"_bn.\1"),
)  # fmt: skip


def from_torchvision(state_dict: StateDict) -> InceptionNetwork:
    """The network of a torchvision googlenet, with or without its auxiliary heads, for any number of classes.

    It computes what torchvision's does with transform_input=False. Torchvision's own pretrained weights go with
    transform_input=True: give such a network images normalised by mean 0.5 and standard deviation 0.5 of values from 0
    to 1. Auxiliary logits come in the order 4a, 4d, in torchvision 4d, 4a (aux_logits2, aux_logits1).

    Args:
        state_dict: of `torchvision.models.googlenet`; copied, in its own dtype.

    Raises:
        ValueError: it is not one; names what does not fit.
    """
    state_dict = unwrapped(state_dict)
    auxiliary = any(name.startswith("aux") for name in state_dict)
    return _load(_googlenet(_length(state_dict, "fc.bias"), auxiliary), state_dict, TORCHVISION_NAMES)


def to_torchvision(network: InceptionNetwork) -> dict[str, Tensor]:
    """A state dict for `torchvision.models.googlenet(num_classes=..., aux_logits=...)`, sharing memory with `network`.

    Raises:
        ValueError: `network` is another one, whose weights torchvision could not take or would use otherwise.
    """
    state = network.state_dict()
    like = _googlenet(network.classifier.out_features, bool(network.auxiliary)).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if network.variant != TORCHVISION or shapes != {name: tensor.shape for name, tensor in like.items()}:
        raise ValueError(
            "the network is not torchvision's googlenet; that is inception_v1('3x3', stem='imagenet', "
            "variant=TORCHVISION) at width 1"
        )
    return {_external_name(name, TORCHVISION_NAMES): tensor for name, tensor in state.items()}


def from_cadene(state_dict: StateDict) -> InceptionNetwork:
    """The network of a bninception of pretrained-models.pytorch, for any number of classes.

    Its convolutions have biases. In evaluation batch norm subtracts its running mean from them, so the network made
    here has none, and a mean that is smaller by as much.

    Args:
        state_dict: also in older forms, with norms of shape (1, C), without num_batches_tracked, or `fc` for
            `last_linear`; copied, in its own dtype. The original wants BGR images from 0 to 255, less their mean.

    Raises:
        ValueError: it is not one; names what does not fit.
    """
    state = {}
    for name, tensor in unwrapped(state_dict).items():
        current = f"last_linear.{name[3:]}" if name.startswith("fc.") else name
        state[current] = tensor.reshape(-1) if "_bn." in name and tensor.ndim == 2 else tensor
    for mean in [name for name in state if name.endswith("_bn.running_mean")]:
        bias = mean.replace("_bn.running_mean", ".bias")
        if bias in state:
            state[mean] = state[mean] - state.pop(bias)
    variant = replace(CADENE, conv_bias=False)
    with torch.device("meta"):
        network = inception_v2(stem="imagenet", num_classes=_length(state, "last_linear.bias"), variant=variant)
    return _load(network, state, CADENE_NAMES)


def unwrapped(state: StateDict) -> StateDict:
    """`state` by the names of the bare network, without module. and _orig_mod. anywhere, and without n_averaged."""
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
        if short != "n_averaged":
            bare[name if short in bare else short] = tensor  # of two weights for one place `_load` names the second
    return bare


def _googlenet(num_classes: int, auxiliary: bool) -> InceptionNetwork:
    with torch.device("meta"):  # no random weights are drawn
        return inception_v1(
            "3x3", stem="imagenet", dropout=0.2, num_classes=num_classes, auxiliary=auxiliary, variant=TORCHVISION
        )


def _length(state: StateDict, name: str) -> int:
    return len(state[name]) if name in state else 1  # any number, because `_load` raises: the name is missing


def _external_name(name: str, names: Names) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _load(network: InceptionNetwork, state: StateDict, names: Names) -> InceptionNetwork:
    """`network`, which is on the meta device, with copies of the tensors of `state`, which has other names."""
    own_names = {_external_name(name, names): name for name in network.state_dict()}
    try:
        copies = {own_names.get(name, name): tensor.clone() for name, tensor in state.items()}
        network.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        text = "not the state dict expected; the names below are those of this package:"
        raise ValueError(f"{text}\n{str(error)[:600]}") from None
    return network
