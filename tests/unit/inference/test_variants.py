"""Variants for inference compute the same logits; which layers they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import ModelConfig
from cifar_dist.data import augment
from cifar_dist.inference.variants import FromUint8, MergedInception, prepare
from cifar_dist.models.architectures import create_model, inception_v1, inception_v2, inception_v2_slim
from cifar_dist.models.layers import Variant


def trained(network: nn.Module) -> nn.Module:
    """`network` in eval mode with statistics, scales and biases that matter."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


SMALL: dict[str, Any] = {"width": 0.0625}
NETWORKS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "v1 whiten": (inception_v1, {**SMALL, "stem": "whiten"}),
    "v1 pooled double3x3": (inception_v1, {**SMALL, "stem": "pooled", "branch5x5": "double3x3"}),
    "v1 imagenet": (inception_v1, {**SMALL, "stem": "imagenet"}),
    "v1 without norm": (inception_v1, {**SMALL, "stem": "imagenet", "variant": Variant(norm="none")}),
    "v2 cifar": (inception_v2, SMALL),
    "v2 slim strided": (inception_v2_slim, {**SMALL, "stem": "strided"}),
}


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_variants_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, options = NETWORKS[name]
    network, images = trained(make(**options)), torch.randn(8, 3, 32, 32)
    expected, before = network(images), convolutions(network)
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for fold, merge in ((False, True), (True, False), (True, True)):
        if fold and not has_norm:
            with pytest.raises(ValueError, match="fold_batch_norm is for networks with batch norm"):
                prepare(network, fold, merge)
            continue
        variant = prepare(network, fold, merge)
        torch.testing.assert_close(variant(images), expected, atol=1e-5, rtol=1e-5)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in variant.modules())
        assert (norms == 0) == (fold or not has_norm)
        modules = sum(isinstance(module, MergedInception) for module in variant.modules())
        assert modules == (0 if not merge else 9 if make is inception_v1 else 10)
        saved = 2 * modules - (0 if make is inception_v1 or not merge else 2)  # 3c and 4e have no 1x1 branch
        assert convolutions(variant) == before - saved
    assert torch.equal(network(images), expected), "it is a copy that is changed"


@torch.inference_mode()
def test_uint8_is_normalised_as_in_training() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = FromUint8(nn.Identity(), augment.MEAN, augment.STD)
    assert torch.equal(model(images), augment.normalize(images, torch.float32))
    assert not model.state_dict(), "the weights have the same names with and without it"


class Foreign(nn.Module):
    """Batch norm that is in no nn.Sequential."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        if not self.traceable and x.sum() == 0:
            return x
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class Layers(nn.Sequential):
    """With a forward pass of its own, which names its layers by number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self[1](self[0](x)))


def foreign(config: ModelConfig, num_classes: int) -> nn.Module:  # noqa: ARG001 - as model.name wants it
    return Foreign()


@torch.no_grad()
def test_foreign_networks() -> None:
    network = trained(create_model(ModelConfig(name=f"{__name__}:foreign")))
    images = torch.randn(2, 3, 32, 32)
    folded = prepare(network, True, False)
    torch.testing.assert_close(folded(images), network(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    layers = trained(nn.Sequential(Layers(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 3)))
    folded = prepare(layers, True, False)
    torch.testing.assert_close(folded(images), layers(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="merge_1x1 is for networks of Inception modules"):
        prepare(network, False, True)
    with pytest.raises(ValueError, match=r"fold_batch_norm: torch\.fx cannot trace the network"):
        prepare(Foreign(traceable=False), True, False)
