"""Variants of a trained network for inference: batch norm folded, 1x1 convolutions merged, uint8 images as input.

Becomes a part of the exported model.py, like the modules of models/ that it imports.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cifar_dist.models.inception import Inception
from cifar_dist.models.layers import ConvNormAct


class MergedInception(nn.Module):
    """An Inception module in eval mode that computes the 1x1 convolutions on its input as one; shapes are the same."""

    def __init__(self, module: Inception) -> None:
        super().__init__()
        layers = [module.branch1x1, module.branch3x3[0], module.branch5x5[0]]
        readers = [layer for layer in layers if isinstance(layer, ConvNormAct)]
        self.sizes = [layer.conv.out_channels for layer in readers]
        self.readers = merged(readers)
        self.branch3x3, self.branch5x5 = module.branch3x3[1:], module.branch5x5[1:]
        self.branch_pool = module.branch_pool

    def forward(self, x: Tensor) -> Tensor:
        *first, reduced3x3, reduced5x5 = self.readers(x).split(self.sizes, dim=1)
        return torch.cat([*first, self.branch3x3(reduced3x3), self.branch5x5(reduced5x5), self.branch_pool(x)], dim=1)


class FromUint8(nn.Module):
    """Normalises images and computes `network`: uint8 (N, 3, 32, 32) to logits. `mean`, `std`: of pixels 0 to 255."""

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([1 / value for value in std]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.to(self.mean.dtype) - self.mean) * self.scale)
        return logits


@torch.no_grad()
def prepare(network: nn.Module, fold_batch_norm: bool, merge_1x1: bool) -> nn.Module:
    """A copy of `network`, in eval mode, with the same logits up to rounding.

    Args:
        fold_batch_norm: compute batch norm as a part of the convolution before it.
        merge_1x1: compute the 1x1 convolutions on the input of an Inception module as one.

    Raises:
        ValueError: it has nothing to fold, or nothing to merge.
    """
    network = copy.deepcopy(network).eval()
    if fold_batch_norm:
        network = _folded(network)
    if merge_1x1:
        modules = [(name, module) for name, module in network.named_modules() if isinstance(module, Inception)]
        if not modules:
            raise ValueError("merge_1x1 is for networks of Inception modules, of which this one has none")
        for name, module in modules:
            network.set_submodule(name, MergedInception(module))
    return network.eval()


def _folded(network: nn.Module) -> nn.Module:
    if not _norms(network):
        raise ValueError("fold_batch_norm is for networks with batch norm, which this one has not")
    plain = (nn.Sequential.forward, ConvNormAct.forward)  # another forward may use its layers by number
    for layers in [module for module in network.modules() if type(module).forward in plain]:
        assert isinstance(layers, nn.Sequential)
        for k in reversed(range(len(layers) - 1)):
            conv, norm = layers[k], layers[k + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                layers[k] = fuse_conv_bn_eval(conv, norm)
                del layers[k + 1]
    if _norms(network):  # of a network that is no nn.Sequential
        from torch.fx.experimental.optimization import fuse

        for norm in _norms(network):
            norm.__class__ = nn.BatchNorm2d  # the same in eval mode, and torch.fx knows it
        try:
            network = fuse(network)
        except Exception as error:
            raise ValueError(f"fold_batch_norm: torch.fx cannot trace the network: {error}") from error
    if _norms(network):
        raise ValueError("fold_batch_norm: not every batch norm of the network follows a convolution")
    return network


def _norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def merged(layers: Sequence[ConvNormAct]) -> nn.Sequential:
    """One 1x1 convolution, norm and ReLU in place of several on one input; outputs are concatenated by channel."""
    convs, norms = [layer.conv for layer in layers], [layer.norm for layer in layers if layer.norm is not None]
    biases = [conv.bias for conv in convs if conv.bias is not None]
    channels = sum(conv.out_channels for conv in convs)
    conv = nn.Conv2d(convs[0].in_channels, channels, 1, bias=bool(biases))
    conv.weight = nn.Parameter(torch.cat([layer.weight for layer in convs]))
    if biases:
        conv.bias = nn.Parameter(torch.cat(biases))
    if not norms:
        return nn.Sequential(conv, nn.ReLU(inplace=True))
    norm = nn.BatchNorm2d(channels, norms[0].eps)
    parts = [part.state_dict() for part in norms]
    together = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].ndim}
    norm.load_state_dict(together | {"num_batches_tracked": parts[0]["num_batches_tracked"]})
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))
