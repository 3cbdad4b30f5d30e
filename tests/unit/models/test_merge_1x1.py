"""The merged form of the 1x1 convolutions: the same numbers and gradients by fewer convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cifar_dist.config import ModelConfig
from cifar_dist.models.architectures import MODELS, V1, V2, create_model
from cifar_dist.models.inception import Inception, Rows
from cifar_dist.models.layers import CADENE, Variant
from cifar_dist.models.network import InceptionNetwork, Logits

FORMS = (False, True)


def both(name: str, **options: Any) -> list[InceptionNetwork]:
    """The plain and the merged form, with the same weights, none of them as they were initialised."""
    models = []
    for merge in FORMS:
        torch.manual_seed(0)
        chosen: dict[str, Any] = {"stem": "strided", "width": 0.125} | options
        model = MODELS[name](merge_1x1=merge, **chosen)
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
        models.append(model)
    return models


def outputs_and_gradients(model: InceptionNetwork) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = 224 if model.stem.grid == 28 else 32
    images = torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)  # of the heads' dropout
    result = model.double()(images)
    outputs = [result.main, *result.auxiliary] if isinstance(result, Logits) else [result]
    weights = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    torch.autograd.backward(torch.stack([(output * weights).sum() for output in outputs]).sum())
    found = {"images": images.grad, **{name: p.grad for name, p in model.named_parameters()}}
    assert all(gradient is not None for gradient in found.values())
    return {f"output {k}": output.detach() for k, output in enumerate(outputs)} | found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("inception_v1", {"stem": stem}) for stem in ("cifar", "pooled", "strided", "whiten")],
        ("inception_v1", {"auxiliary": True, "variant": Variant(norm="none")}),
        ("inception_v1", {"branch5x5": "double3x3", "width": 0.25}),
        *[(name, {"auxiliary": True}) for name in MODELS],
        ("inception_v2", {"stem": "pooled"}),
        ("inception_v2", {"variant": CADENE}),  # with convolution biases, which the pool's zeros do not have
    ],
)
def test_outputs_and_gradients_are_equal(name: str, options: dict[str, Any]) -> None:
    plain, merged = (outputs_and_gradients(model) for model in both(name, **options))
    assert plain.keys() == merged.keys()
    for key, expected in plain.items():
        scale = max(1.0, expected.abs().max().item())
        assert (merged[key] - expected).abs().max().item() < 1e-10 * scale, key


@pytest.mark.parametrize(("name", "saved"), [("inception_v1", 9 * 2), ("inception_v2", 7 * 3 + 2 + 2 * 1)])
def test_fewer_convolutions_in_training_only(name: str, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: calls.append(x) or conv2d(x, *args))  # type: ignore[func-returns-value]
    counts = []
    for model in both(name):
        for training in (True, False):
            calls.clear()
            model.train(training)(torch.zeros(2, 3, 32, 32))
            counts.append(len(calls))
    plain, plain_eval, merged, merged_eval = counts
    layers = sum(isinstance(module, nn.Conv2d) for module in both(name)[0].modules())
    assert plain == plain_eval == merged_eval == layers
    assert merged == layers - saved


def test_a_projection_with_bias_stays_behind_its_pool() -> None:
    joins = {
        variant: [block._merge_projection for block in both("inception_v2", variant=variant)[1].blocks.values()]
        for variant in (Variant(), CADENE)
    }
    assert sum(map(bool, joins[Variant()])) == 7
    assert not any(joins[CADENE])


@pytest.mark.parametrize("name", ["inception_v1", "inception_v2"])
def test_statistics_and_scores_are_the_plain_forms_to_the_bit(name: str) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for model in both(name):
        update_bn([images], model)
        results.append([*model.state_dict().values(), model.eval()(images)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("setting", "merges"), [("on", True), ("off", False), ("auto", True)])
def test_the_setting_decides(setting: Any, merges: bool) -> None:
    modules = create_model(ModelConfig(width=0.125, merge_1x1=setting)).modules()
    assert {module.merge_1x1 for module in modules if isinstance(module, Inception)} == {merges}


@pytest.mark.parametrize(
    ("table", "branch5x5", "kept"),
    [(V1, "5x5", ("3a", "pool3", "4a", "4d")), (V2, "double3x3", ("3a", "3c", "4a", "4d", "5b"))],
)
def test_one_graph_for_the_compiler(table: Rows, branch5x5: str, kept: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    rows = {name: table[name] for name in kept}  # each kind of module once: the compiler takes its time
    model = InceptionNetwork(rows, branch5x5, stem="strided", width=0.125, auxiliary=True, merge_1x1=True)
    for head in model.auxiliary.values():
        head.dropout.p = 0.0  # type: ignore[union-attr]
    images = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    expected = model(images)
    assert isinstance(compiled, Logits)
    torch.testing.assert_close(compiled.main, expected.main, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled.auxiliary, expected.auxiliary, rtol=1e-3, atol=1e-4)
