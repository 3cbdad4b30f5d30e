"""The auxiliary heads: where they sit, when they run, and the network without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import ModelConfig
from cifar_dist.models.architectures import MODELS, built_in_network
from cifar_dist.models.layers import DEFAULT, TORCHVISION, Variant
from cifar_dist.models.network import AUXILIARY_WEIGHT, AuxiliaryHead, InceptionNetwork, Logits, without_auxiliary


def small(name: str = "inception_v1", auxiliary: bool = True, stem: str = "strided") -> InceptionNetwork:
    torch.manual_seed(3)
    config = ModelConfig(name=name, stem=stem, width=0.125, auxiliary=auxiliary)  # type: ignore[arg-type]
    return built_in_network(config, 10)


@pytest.mark.parametrize("name", MODELS)
def test_in_training_only(name: str) -> None:
    model, images = small(name), torch.randn(4, 3, 32, 32)
    outputs = model(images)
    assert isinstance(outputs, Logits)
    assert [tuple(logits.shape) for logits in (outputs.main, *outputs.auxiliary)] == [(4, 10)] * 3
    assert isinstance(model.eval()(images), Tensor)
    assert isinstance(small(name, auxiliary=False)(images), Tensor)
    assert AUXILIARY_WEIGHT == 0.3


@pytest.mark.parametrize(
    ("stem", "inputs"), [("cifar", 2048), ("pooled", 512), ("strided", 512), ("whiten", 512), ("imagenet", 2048)]
)
def test_sizes(stem: str, inputs: int) -> None:
    with torch.device("meta"):
        model = MODELS["inception_v1"](stem=stem, auxiliary=True, num_classes=7)
        heads = [head for head in model.auxiliary.values() if isinstance(head, AuxiliaryHead)]
        assert [tuple(head.conv.conv.weight.shape) for head in heads] == [(128, 512, 1, 1), (128, 528, 1, 1)]
        assert [tuple(head.hidden.weight.shape) for head in heads] == [(1024, inputs)] * 2
        side = 224 if stem == "imagenet" else 32
        outputs = model(torch.empty(2, 3, side, side))
    assert [logits.shape for logits in outputs.auxiliary] == [(2, 7)] * 2


@pytest.mark.parametrize(("variant", "side"), [(DEFAULT, 4), (TORCHVISION, 4), (Variant(norm="none"), 4)])
def test_auxiliary_head_matches_the_paper(variant: Variant, side: int) -> None:
    torch.manual_seed(0)
    head = AuxiliaryHead(6, 14, 10, 1.0, variant).eval()
    x = torch.randn(2, 6, 14, 14)
    windows = [slice(k, k + 5) for k in (0, 3, 6, 9)]
    if variant is TORCHVISION:
        windows = [slice(k * 14 // 4, -(-(k + 1) * 14 // 4)) for k in range(4)]
    pooled = torch.stack([torch.stack([x[:, :, r, c].mean(dim=(2, 3)) for c in windows], -1) for r in windows], -2)
    assert pooled.shape == (2, 6, side, side)
    features = torch.relu(head.hidden(head.conv(pooled).flatten(1)))
    torch.testing.assert_close(head(x), head.classifier(features), rtol=1e-4, atol=1e-6)
    assert head.dropout.p == 0.7
    assert not torch.equal(head.train()(x), head(x))


def test_inputs_of_the_auxiliary_heads() -> None:
    model, images = small(), torch.randn(4, 3, 32, 32)
    read: list[Tensor] = []
    written: dict[str, Tensor] = {}
    for head in model.auxiliary.values():
        head.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    for name, block in model.blocks.items():
        block.register_forward_hook(lambda _m, _x, y, name=name: written.update({name: y}))
    model(images)
    assert [tensor is written[name] for tensor, name in zip(read, ("4a", "4d"), strict=True)] == [True, True]


def test_they_leave_the_other_weights_alone() -> None:
    with_heads, without = small().state_dict(), small(auxiliary=False).state_dict()
    assert all(torch.equal(with_heads[name], tensor) for name, tensor in without.items())
    extra = set(with_heads) - set(without)
    assert extra == {name for name in with_heads if name.startswith("auxiliary.")} != set()


@pytest.mark.parametrize("name", MODELS)
def test_without_auxiliary_shares_everything(name: str) -> None:
    model, images = small(name), torch.randn(4, 3, 32, 32)
    bare = without_auxiliary(model)
    small(name, auxiliary=False).load_state_dict(bare.state_dict())  # strict
    assert len(model.auxiliary) == 2
    assert isinstance(bare(images), Tensor)
    assert isinstance(model(images), Logits)
    for tensors in (model.named_parameters, model.named_buffers):
        others = dict(bare.named_parameters()) | dict(bare.named_buffers())
        assert all(others[key] is tensor for key, tensor in tensors() if not key.startswith("auxiliary."))
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert torch.equal(bare.eval()(images), model.eval()(images))
    assert not copy.deepcopy(bare).auxiliary
    untouched = small(auxiliary=False)
    assert without_auxiliary(untouched) is untouched
    linear = nn.Linear(2, 2)
    assert without_auxiliary(linear) is linear
