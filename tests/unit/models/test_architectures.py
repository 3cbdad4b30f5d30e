"""Both Inceptions in shapes and weights: tables, stems, initialisation, and what batch norm does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cifar_dist.config import ModelConfig
from cifar_dist.models.architectures import (
    MODELS,
    V1,
    V2,
    V2_SLIM,
    built_in_network,
    inception_v1,
    inception_v2,
    inception_v2_slim,
)
from cifar_dist.models.layers import BatchNorm2d, ConvNormAct, Variant, num_parameters, scaled
from cifar_dist.models.network import InceptionNetwork
from cifar_dist.models.stems import GRIDS, Stem, WhiteningConv, whitening_filters

V1_OUTPUTS = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
V2_OUTPUTS = {
    "3a": 256, "3b": 320, "3c": 576, "4a": 576, "4b": 576, "4c": 608, "4d": 608, "4e": 1056, "5a": 1024, "5b": 1024
}  # fmt: skip
OUTPUTS = {
    "inception_v1": V1_OUTPUTS,
    "inception_v2": V2_OUTPUTS,
    "inception_v2_slim": {**V2_OUTPUTS, "4c": 576, "4d": 576, "4e": 1024},
}
STEMS = ["cifar", "pooled", "strided", "whiten", "imagenet"]
WITHOUT_NORM = Variant(norm="none")


def quarter(**settings: object) -> InceptionNetwork:
    return built_in_network(replace(ModelConfig(stem="strided", width=0.25), **settings), 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_shapes(name: str, stem: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = MODELS[name](stem=stem)
        for block, module in model.blocks.items():
            module.register_forward_hook(lambda _m, _x, y, block=block: shapes.update({block: tuple(y.shape[1:])}))
        side = 224 if stem == "imagenet" else 32
        assert model(torch.empty(2, 3, side, side)).shape == (2, 10)
        assert model.stem(torch.empty(2, 3, side, side)).shape == (2, 192, GRIDS[stem], GRIDS[stem])
    stages = {"3": GRIDS[stem], "4": GRIDS[stem] // 2, "5": GRIDS[stem] // 4}
    halving = {"3c": "4", "4e": "5"} if "v2" in name else {}
    expected = {
        block: (channels, *[stages[halving.get(block, block[0])]] * 2) for block, channels in OUTPUTS[name].items()
    }
    assert {block: shape for block, shape in shapes.items() if not block.startswith("pool")} == expected


@pytest.mark.parametrize("stem", ["cifar", "pooled", "strided", "whiten"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_quarter_of_the_width_runs(name: str, stem: str) -> None:
    model = MODELS[name](stem=stem, width=0.25)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.out_channels % 8 == 0 for conv in convolutions)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_width() -> None:
    assert [scaled(64, width) for width in (1, 0.25, 0.5, 2, 0.01, 0.3)] == [64, 16, 32, 128, 8, 16]
    for rows in (V1, V2, V2_SLIM):
        for row in rows.values():
            assert row is None or row.at_width(1) == row
    strided = V2["3c"]
    assert strided is not None
    assert strided.at_width(0.25) == (0, 32, 40, 16, 24, 0, "max", 2)
    assert num_parameters(quarter()) == 381_882


def test_names_and_weights_are_those_of_older_checkpoints() -> None:
    torch.manual_seed(7)
    state = quarter().state_dict()
    first = {
        "stem.0.0.weight": [-0.15596044063568115, -0.24294641613960266, 0.2746027410030365],
        "blocks.4c.branch5x5.1.0.weight": [-0.12435007095336914, 0.18261970579624176, -0.042660024017095566],
        "classifier.weight": [-0.0037331320345401764, -0.0021928905043751, -0.010120516642928123],
    }
    for name, values in first.items():
        assert state[name].flatten()[:3].tolist() == pytest.approx(values, rel=1e-6)
    layers = {name.removesuffix(".0.weight") for name in state if name.startswith("blocks.3a") and "0.weight" in name}
    branches = ("branch1x1", "branch3x3.0", "branch3x3.1", "branch5x5.0", "branch5x5.1", "branch_pool.1")
    assert layers == {f"blocks.3a.{branch}" for branch in branches}
    assert {name.split(".")[0] for name in state} == {"stem", "blocks", "classifier"}


def test_configuration_reaches_the_network() -> None:
    torch.manual_seed(1)
    model = quarter(stem="pooled", width=0.5, dropout=0.3, branch5x5="double3x3")
    assert len(model.stem) == 4
    assert model.dropout.p == 0.3
    assert model.classifier.in_features == 512
    assert [layer.conv.kernel_size for layer in model.blocks["3a"].branch5x5] == [(1, 1), (3, 3), (3, 3)]  # type: ignore[union-attr]
    assert not any(isinstance(module, BatchNorm2d) for module in quarter(norm="none").modules())
    assert len(quarter(auxiliary=True).auxiliary) == 2
    assert quarter(name="inception_v2").blocks["4e"].out_channels == 264
    assert quarter(name="inception_v2_slim").blocks["4e"].out_channels == 256


def test_default_variant_has_no_deviations() -> None:
    model = inception_v1()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is None for conv in convolutions)
    assert sum(conv.kernel_size == (5, 5) for conv in convolutions) == 9
    halving = [block for block in model.blocks.values() if isinstance(block, nn.MaxPool2d)]
    assert [(pool.kernel_size, pool.padding, pool.ceil_mode) for pool in halving] == [(3, 1, False)] * 2


def test_pools_of_v2() -> None:
    pools = {name: block.branch_pool[0] for name, block in inception_v2(width=0.25).blocks.items()}  # type: ignore[index]
    halving = {name for name, pool in pools.items() if isinstance(pool, nn.MaxPool2d)}
    assert halving == {"3c", "4e", "5b"}
    assert all(pool.count_include_pad for pool in pools.values() if isinstance(pool, nn.AvgPool2d))
    # On an even grid a padded window, not one that hangs over the edge: as many as the strided convolutions have.
    assert pools["3c"](torch.empty(1, 8, 32, 32)).shape[2:] == (16, 16)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stem("resnet"), "stem is 'resnet'; valid: cifar, pooled, strided, whiten, imagenet"),
        (lambda: inception_v1("7x7"), "branch5x5 is '7x7'; valid: paper, 5x5, double3x3, 3x3"),
        (lambda: inception_v2("5x5"), "branch5x5 is '5x5', but Inception V2 has two 3x3 there; use paper"),
        (lambda: inception_v2_slim(variant=WITHOUT_NORM), "norm is 'none', but Inception V2 .*; use batch"),
        (lambda: Variant(norm="layer"), "norm is 'layer'; valid: batch, none"),  # type: ignore[arg-type]
    ],
)
def test_networks_that_cannot_be_built(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["inception_v1", "inception_v2"])
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.classifier.bias.abs().max().item() == 0


def test_initialisation_without_norm() -> None:
    torch.manual_seed(0)
    model = inception_v1(variant=WITHOUT_NORM)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / module.weight[0].numel())
            assert bound * 0.98 < module.weight.abs().max().item() <= bound
            assert module.bias is not None
            assert torch.all(module.bias == (0.2 if isinstance(module, nn.Conv2d) else 0))


def test_without_norm_it_trains() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    model = inception_v1(stem="strided", width=0.125, variant=WITHOUT_NORM)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.2


def test_the_stem_of_2014_normalises_responses() -> None:
    without, with_batch_norm = (Stem("imagenet", variant=Variant(norm=norm)) for norm in ("none", "batch"))
    assert [type(part).__name__ for part in without] == [
        "ConvNormAct", "MaxPool2d", "LocalResponseNorm", "ConvNormAct", "ConvNormAct", "LocalResponseNorm", "MaxPool2d"
    ]  # fmt: skip
    assert not any(isinstance(part, nn.LocalResponseNorm) for part in with_batch_norm)


def natural_images(n: int) -> Tensor:
    """Random images whose neighbouring pixels and channels resemble each other, float64."""
    noise = torch.randn(n, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 3, stride=1)
    return smooth + 0.7 * smooth.mean(dim=1, keepdim=True) + torch.tensor([0.5, -1.0, 0.0]).reshape(3, 1, 1)


def test_whitening_filters_whiten() -> None:
    images = natural_images(300)
    filters = whitening_filters(images, 4, eps=0.0)
    assert filters.shape == (96, 3, 4, 4)
    assert torch.equal(filters[48:], -filters[:48])
    responses = F.conv2d(images, filters[:48]).transpose(0, 1).reshape(48, -1)
    torch.testing.assert_close(responses.cov(correction=0), torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-9)
    norms = filters[:48].flatten(1).norm(dim=1)
    assert (norms.diff() > 0).all()  # by falling variance
    # With eps a direction of variance v comes out with v / (v + eps).
    damped = F.conv2d(images, whitening_filters(images, 4, eps=0.01)[:48]).transpose(0, 1).reshape(48, -1)
    expected = norms**-2 / (norms**-2 + 0.01)
    torch.testing.assert_close(damped.var(dim=1, correction=0), expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"images are torch\.float32; give them as float64"):
        whitening_filters(images.float(), 4)


def test_whitening_filters_do_not_depend_on_rounding() -> None:
    images = natural_images(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    # With every image its mirror image: eigenvectors become symmetric, so that several components are the largest.
    both = torch.cat((images, images.flip(3)))
    again = torch.cat((images.flip(3)[order], images[order]))
    filters = whitening_filters(both, 4)
    torch.testing.assert_close(filters, whitening_filters(again, 4), rtol=0, atol=1e-8)
    assert (filters[:48].flatten(1).amax(dim=1) > 0.999 * filters[:48].flatten(1).abs().amax(dim=1)).all()


def test_whitening_stem() -> None:
    model = quarter(stem="whiten")
    whitening = model.stem[0]
    assert isinstance(whitening, WhiteningConv)
    filters = whitening.weight.flatten(1)
    assert torch.equal(filters.T @ filters, 2 * torch.eye(48))  # a basis and its negatives, until fitted
    assert [name for name, _ in model.stem.named_parameters() if name.startswith("0.")] == ["0.bias"]
    assert "stem.0.weight" in model.state_dict()
    before = whitening.weight.clone()
    torch.autograd.backward(model(torch.randn(4, 3, 32, 32)).square().sum())
    assert torch.equal(whitening.weight, before)
    assert whitening.bias.grad is not None
    assert whitening.bias.grad.abs().max() > 0


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_training_leaves_statistics_alone_and_update_bn_sets_them() -> None:
    torch.manual_seed(0)
    model = quarter()
    before = statistics(model)
    batches = [torch.randn(16, 3, 32, 32) + k for k in range(3)]
    for batch in batches:
        model(batch).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    update_bn(batches, model)
    first = model.stem[0]
    assert isinstance(first, ConvNormAct)
    norm = first.norm
    assert norm is not None
    features = [first.conv(batch) for batch in batches]
    mean = torch.stack([f.mean(dim=(0, 2, 3)) for f in features]).mean(dim=0)
    var = torch.stack([f.var(dim=(0, 2, 3)) for f in features]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
    set_once = statistics(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, set_once, strict=True))
    model(batches[0])
    assert all(torch.equal(a, b) for a, b in zip(set_once, statistics(model), strict=True))


def test_batch_norm_computes_what_torch_computes() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(6), nn.BatchNorm2d(6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    state = {"weight": torch.rand(6), "bias": torch.rand(6), "running_mean": torch.rand(6),
             "running_var": torch.rand(6) + 0.5, "num_batches_tracked": torch.tensor(3)}  # fmt: skip
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(8, 6, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_dropout_and_modes() -> None:
    torch.manual_seed(0)
    model = quarter(dropout=0.5)
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    # Alone or in a batch, a sample gets the same logits in evaluation.
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
