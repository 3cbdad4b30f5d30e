"""Inception V1 in numbers: parameters, shapes, work, and what batch norm does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cifar_dist.config import ModelConfig
from cifar_dist.models.inception_v1 import ROWS, InceptionV1
from cifar_dist.models.layers import BatchNorm2d, ConvNormAct, Stem, num_parameters, scaled
from cifar_dist.models.registry import create_model

OUTPUTS = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
PARAMETERS = {"cifar": 5_871_914, "strided": 5_871_914, "pooled": 5_983_402}
MULTIPLY_ADDS = {"cifar": 1447e6, "pooled": 392e6, "strided": 362e6}
GRIDS = {"cifar": (32, 16, 8), "pooled": (16, 8, 4), "strided": (16, 8, 4)}
STEMS = list(PARAMETERS)


@pytest.mark.parametrize("stem", STEMS)
def test_parameters_shapes_and_work(stem: str) -> None:
    model = InceptionV1(stem).eval()
    assert num_parameters(model) == PARAMETERS[stem]
    shapes: dict[str, tuple[int, ...]] = {}
    multiply_adds: list[int] = []

    def note(name: str) -> object:
        def hook(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        return hook

    def count(module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        per_output = module.weight[0].numel()
        multiply_adds.append(output[0].numel() * per_output)

    for name, block in model.blocks.items():
        block.register_forward_hook(note(name))  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 10)
    stages = dict(zip("345", GRIDS[stem], strict=True))
    expected = {name: (channels, stages[name[0]], stages[name[0]]) for name, channels in OUTPUTS.items()}
    assert {name: shape for name, shape in shapes.items() if name in OUTPUTS} == expected
    assert sum(multiply_adds) == pytest.approx(MULTIPLY_ADDS[stem], rel=0.01)


def test_width() -> None:
    assert [scaled(64, width) for width in (1, 0.25, 0.5, 2, 0.01, 0.3)] == [64, 16, 32, 128, 8, 16]
    for row in ROWS.values():
        if row is not None:
            assert [scaled(channels, 1.0) for channels in row] == list(row)
    quarter = InceptionV1("strided", width=0.25)
    convolutions = [module for module in quarter.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.out_channels % 8 == 0 for conv in convolutions)
    assert quarter(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert num_parameters(quarter) < PARAMETERS["strided"] / 12


def test_configuration_reaches_the_network() -> None:
    torch.manual_seed(1)
    model = create_model(ModelConfig(stem="pooled", width=0.5, dropout=0.3))
    assert isinstance(model, InceptionV1)
    assert isinstance(model.stem[0], ConvNormAct)
    assert len(model.stem) == 4
    assert model.dropout.p == 0.3
    torch.manual_seed(1)
    again = create_model(ModelConfig(stem="pooled", width=0.5, dropout=0.3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="stem is 'imagenet'; valid: cifar, pooled, strided"):
        Stem("imagenet", 192, 1.0)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = InceptionV1()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.classifier.bias.abs().max().item() == 0


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_training_leaves_statistics_alone_and_update_bn_sets_them() -> None:
    torch.manual_seed(0)
    model = InceptionV1("strided", width=0.25)
    before = statistics(model)
    batches = [torch.randn(16, 3, 32, 32) + k for k in range(3)]
    for batch in batches:
        model(batch).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    update_bn(batches, model)
    norm = model.stem[0][1]  # type: ignore[index]
    features = [model.stem[0][0](batch) for batch in batches]  # type: ignore[index]
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
    model = InceptionV1("strided", width=0.25, dropout=0.5)
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    # Alone or in a batch, a sample gets the same logits in evaluation.
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
