"""Weights from torchvision and from Cadene: the same names, shapes and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cifar_dist.models.architectures import inception_v1
from cifar_dist.models.layers import TORCHVISION, num_parameters
from cifar_dist.models.network import InceptionNetwork, Logits, without_auxiliary
from cifar_dist.models.published.convert import from_cadene, from_torchvision, to_torchvision

State = dict[str, Tensor]


def googlenet(auxiliary: bool = True, transform: bool = False) -> nn.Module:
    """Torchvision's, with random weights and random statistics, in float64, for 7 classes."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.googlenet(
        weights=None, init_weights=False, aux_logits=auxiliary, num_classes=7, transform_input=transform
    )
    for name, buffer in model.named_buffers():
        if buffer.ndim:
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.5, 0.5)
    return model.double().eval()


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return googlenet()


@pytest.mark.parametrize("auxiliary", [True, False])
def test_logits_of_torchvision(auxiliary: bool) -> None:
    original = googlenet(auxiliary)
    ours = from_torchvision(original.state_dict()).eval()
    with torch.no_grad():
        expected = original(images())
        assert expected.std().item() > 0.01
        torch.testing.assert_close(ours(images()), expected, rtol=0, atol=1e-10)
        single, expected_single = ours.float()(images().float()), original.float()(images().float())
    torch.testing.assert_close(single, expected_single, rtol=0, atol=1e-4)
    assert bool(ours.auxiliary) == auxiliary
    assert ours.dropout.p == 0.2


def test_logits_of_torchvision_in_training() -> None:
    original = googlenet()
    ours = from_torchvision(original.state_dict())
    for module in [*original.modules(), *ours.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    outputs, expected = ours.train()(images(3)), original.train()(images(3))
    assert isinstance(outputs, Logits)
    torch.testing.assert_close(outputs.main, expected.logits, rtol=0, atol=1e-10)
    # Theirs are named in the order of depth, but come out in the other.
    assert expected[1] is expected.aux_logits2
    torch.testing.assert_close(outputs.auxiliary, (expected.aux_logits1, expected.aux_logits2), rtol=0, atol=1e-10)


def test_back_to_torchvision(original: nn.Module) -> None:
    network = from_torchvision(original.state_dict())
    state = to_torchvision(network)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in original.state_dict().items()
    }
    again: nn.Module = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=7).double().eval()
    again.load_state_dict(state)
    bare: nn.Module = torchvision.models.googlenet(
        weights=None, init_weights=False, num_classes=7, aux_logits=False
    ).double().eval()  # fmt: skip
    bare.load_state_dict(to_torchvision(without_auxiliary(network)))
    with torch.no_grad():
        expected = original(images(1))
        assert torch.equal(again(images(1)), expected)
        assert torch.equal(bare(images(1)), expected)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
        lambda s: {f"_orig_mod.{name}": tensor for name, tensor in s.items()},
        lambda s: {f"module._orig_mod.{name}": tensor for name, tensor in s.items()},
        lambda s: {f"_orig_mod.module.{name}": tensor for name, tensor in s.items()},
        lambda s: {f"module.module._orig_mod._orig_mod.{name}": tensor for name, tensor in s.items()},
        lambda s: {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in s.items()},  # parts were compiled
        lambda s: {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in s.items()}},
    ],
)
def test_prefixes_of_wrappers_are_left_out(original: nn.Module, wrapped: Callable[[State], State]) -> None:
    for read, state in ((from_torchvision, original.state_dict()), (from_cadene, cadene_state())):
        expected, found = read(state).state_dict(), read(wrapped(state)).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_real_wrappers_prefixes_are_left_out(original: nn.Module) -> None:
    compiled: nn.Module = torch.compile(original)  # type: ignore[assignment]
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(compiled))
    state = averaged.state_dict()
    assert "module.module._orig_mod.fc.bias" in state
    assert torch.equal(from_torchvision(state).classifier.bias, original.state_dict()["fc.bias"])


def test_two_weights_for_one_place_are_refused(original: nn.Module) -> None:
    state = original.state_dict()
    with pytest.raises(ValueError, match=r'Unexpected .* "module\.fc\.bias"'):
        from_torchvision(state | {"module.fc.bias": state["fc.bias"] + 1})


def test_converted_network_is_a_copy_and_trains(original: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    generator = torch.random.get_rng_state()
    network = from_torchvision(original.state_dict())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_pretrained_weights_want_images_normalised_to_one_half() -> None:
    original = googlenet(auxiliary=False, transform=True)
    ours = from_torchvision(original.state_dict()).eval()
    pixels = torch.rand(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normalised = torchvision.transforms.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = original(normalised)
        torch.testing.assert_close(ours((pixels - 0.5) / 0.5), expected, rtol=0, atol=1e-10)
        assert (ours(normalised) - expected).abs().max() > 1e-6


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "conv1.bn.weight"), r'Missing key\(s\) in state_dict: "stem\.0\.1\.weight"\. $'),
        (lambda s: without(s, "fc.bias"), r'Missing .* "classifier\.bias"'),
        (lambda s: s | {"extra.weight": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "extra\.weight"'),
        (
            lambda s: s | {"conv2.conv.weight": torch.zeros(64, 64, 3, 3)},
            r"size mismatch for stem\.2\.0\.weight: .*\[64, 64, 3, 3\]",
        ),
        (lambda _: nn.Linear(2, 2).state_dict(), r'Missing .* "stem\.0\.0\.weight"'),
    ],
)
def test_another_models_weights_are_refused(
    original: nn.Module, change: Callable[[State], State], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_torchvision(change(original.state_dict()))


@pytest.mark.parametrize(
    "build",
    [
        inception_v1,
        lambda: inception_v1(stem="imagenet", variant=TORCHVISION),
        lambda: inception_v1("3x3", stem="imagenet"),
        lambda: inception_v1("3x3", stem="imagenet", width=0.5, variant=TORCHVISION),
    ],
)
def test_only_the_torchvision_variant_converts_back(build: Callable[[], InceptionNetwork]) -> None:
    with torch.device("meta"):
        network = build()
    with pytest.raises(ValueError, match="the network is not torchvision's googlenet"):
        to_torchvision(network)


# Channels as in the paper's table: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection.
CADENE_ROWS = {
    "3a": (64, 64, 64, 64, 96, 32), "3b": (64, 64, 96, 64, 96, 64), "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128), "4b": (192, 96, 128, 96, 128, 128), "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128), "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128), "5b": (352, 192, 320, 192, 224, 128),
}  # fmt: skip


def cadene_layers() -> Iterator[tuple[str, int, int, int]]:
    """(name, inputs, outputs, kernel) of every convolution of bninception."""
    yield from [("conv1_7x7_s2", 3, 64, 7), ("conv2_3x3_reduce", 64, 64, 1), ("conv2_3x3", 64, 192, 3)]
    inputs = 192
    for module, (one, reduce3, three, reduce_double, double, projection) in CADENE_ROWS.items():
        prefix = f"inception_{module}_"
        if one:
            yield f"{prefix}1x1", inputs, one, 1
            yield f"{prefix}pool_proj", inputs, projection, 1
        yield f"{prefix}3x3_reduce", inputs, reduce3, 1
        yield f"{prefix}3x3", reduce3, three, 3
        yield f"{prefix}double_3x3_reduce", inputs, reduce_double, 1
        yield f"{prefix}double_3x3_1", reduce_double, double, 3
        yield f"{prefix}double_3x3_2", double, double, 3
        inputs = one + three + double + (projection or inputs)


def cadene_state(num_classes: int = 7) -> State:
    """A state dict with bninception's names and shapes, random and in float64."""
    torch.manual_seed(0)
    state: State = {}
    for name, inputs, outputs, kernel in cadene_layers():
        fan_in = inputs * kernel**2
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * (2 / fan_in) ** 0.5
        state[f"{name}.bias"] = torch.randn(outputs)
        state[f"{name}_bn.weight"] = torch.rand(outputs) + 0.5
        state[f"{name}_bn.bias"] = torch.randn(outputs) * 0.2
        state[f"{name}_bn.running_mean"] = torch.randn(outputs)
        state[f"{name}_bn.running_var"] = torch.rand(outputs) + 0.5
    state["last_linear.weight"] = torch.randn(num_classes, 1024) * 0.05
    state["last_linear.bias"] = torch.randn(num_classes)
    return {name: tensor.double() for name, tensor in state.items()}


def cadene_logits(state: State, x: Tensor) -> Tensor:
    """What bninception computes in evaluation, by functions and names alone."""

    def layer(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (
            state[f"{name}_bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, scale, shift, training=False, eps=1e-5))

    def halve(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=2, ceil_mode=True)

    x = halve(layer("conv1_7x7_s2", x, stride=2))
    x = halve(layer("conv2_3x3", layer("conv2_3x3_reduce", x)))
    for module in CADENE_ROWS:
        prefix, stride = f"inception_{module}_", 2 if module in ("3c", "4e") else 1
        double = layer(f"{prefix}double_3x3_1", layer(f"{prefix}double_3x3_reduce", x))
        branches = [
            layer(f"{prefix}3x3", layer(f"{prefix}3x3_reduce", x), stride),
            layer(f"{prefix}double_3x3_2", double, stride),
        ]
        if stride == 2:
            branches.append(halve(x))
        else:
            pool = F.max_pool2d if module == "5b" else F.avg_pool2d
            pooled = pool(x, 3, stride=1, padding=1)
            branches = [layer(f"{prefix}1x1", x), *branches, layer(f"{prefix}pool_proj", pooled)]
        x = torch.cat(branches, dim=1)
    return F.linear(F.avg_pool2d(x, 7).flatten(1), state["last_linear.weight"], state["last_linear.bias"])


def test_logits_of_cadene() -> None:
    state = cadene_state()
    network = from_cadene(state).eval()
    with torch.no_grad():
        expected = cadene_logits(state, images())
        assert expected.std().item() > 0.1
        torch.testing.assert_close(network(images()), expected, rtol=0, atol=1e-10)


def test_number_of_parameters_of_cadene() -> None:
    state = cadene_state(num_classes=1000)
    trained = [tensor.numel() for name, tensor in state.items() if ".running_" not in name]
    assert sum(trained) == 11_295_240
    # Without biases in front of batch norm.
    assert num_parameters(from_cadene(state)) == 11_285_224


def test_older_files_of_cadene() -> None:
    state = cadene_state()
    reference = from_cadene(state).state_dict()
    older = {
        name.replace("last_linear", "fc"): tensor.reshape(1, -1) if "_bn." in name else tensor
        for name, tensor in state.items()
    }
    newer = state | {f"{name}_bn.num_batches_tracked": torch.tensor(5) for name, *_ in cadene_layers()}
    for other in (older, newer):
        found = from_cadene(other).state_dict()
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in reference.items() if "num_batches" not in name)
    assert found["stem.0.1.num_batches_tracked"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "inception_3c_3x3.weight"), r'Missing .* "blocks\.3c\.branch3x3\.1\.0\.weight"'),
        (lambda s: s | {"inception_3c_1x1.weight": torch.zeros(1)}, r'Unexpected .* "inception_3c_1x1\.weight"'),
        (lambda _: googlenet().state_dict(), r'Missing .* "stem\.0\.0\.weight"'),
    ],
)
def test_other_weights_than_cadenes_are_refused(change: Callable[[State], State], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_cadene(change(cadene_state()))
