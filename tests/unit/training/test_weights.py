"""Weights that a run starts from: whose files are read, what has to fit, and which classifiers stay random."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from cifar_dist.config import Config, ModelConfig, OptimConfig, to_yaml
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint
from cifar_dist.training.optim import Ema
from cifar_dist.training.weights import copy_weights, decisive, decode
from tests.support import runs
from tests.unit.models.test_convert import cadene_state, googlenet

SMALL = ModelConfig(stem="strided", width=0.0625)
WEIGHTS = Path("weights.pt")
TORCHVISION = ModelConfig("inception_v1", stem="imagenet", branch5x5="3x3", variant="torchvision")
CADENE = ModelConfig("inception_v2", stem="imagenet", variant="cadene")


def model_of(config: ModelConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(config)


def saved(value: Any, path: Path) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


def start(model: nn.Module, data: bytes, config: ModelConfig, path: Path = WEIGHTS) -> list[str]:
    return copy_weights(model, decode(data, path), config, path)


def differing(model: nn.Module, expected: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_checkpoint(ema_decay: float | None) -> None:
    """Of a run with a moving average, that is what was scored."""
    source = model_of(SMALL, seed=1)
    average = Ema(source, 0.9)
    average.update_parameters(model_of(SMALL, seed=2))
    config = Config(model=SMALL, optim=OptimConfig(ema_decay=ema_decay))
    state = {"model": source.state_dict(), "ema": average.state_dict(), "config": to_yaml(config)}
    model = model_of(SMALL, seed=3)
    assert start(model, checkpoint.encode(5, state), SMALL) == []
    assert differing(model, source.state_dict() if ema_decay is None else average.module.state_dict()) == set()


@pytest.mark.parametrize("metadata", [None, {"cifar_dist": "{"}, {"cifar_dist": "[1]"}, {"format": "pt"}])
def test_a_file_of_safetensors(metadata: dict[str, str] | None) -> None:
    source, model = model_of(SMALL, seed=1), model_of(SMALL, seed=3)
    assert start(model, save(source.state_dict(), metadata), SMALL, Path("model.safetensors")) == []
    assert differing(model, source.state_dict()) == set()


def test_an_export_of_a_network_of_equal_shapes_is_refused() -> None:
    """A cifar stem and a strided one have the same weights, so the export names its settings."""
    metadata = {"cifar_dist": json.dumps(decisive(replace(SMALL, stem="strided")))}
    data = save(model_of(replace(SMALL, stem="strided"), seed=1).state_dict(), metadata)
    cifar = replace(SMALL, stem="cifar")
    with pytest.raises(CheckpointError, match=r"They need --model\.stem strided$"):
        start(model_of(cifar, seed=3), data, cifar, Path("model.safetensors"))


@pytest.mark.parametrize(
    "wrapped", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"module." + n: s[n] for n in s}]
)
def test_a_file_of_torchvision(wrapped: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    """With 7 classes, so the classifier stays random; its auxiliary heads are left out."""
    source, model = googlenet().float(), model_of(TORCHVISION, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = saved(wrapped(source.state_dict()), tmp_path / "googlenet.pth")
    assert start(model, data, TORCHVISION) == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.state_dict()["classifier.weight"], before["classifier.weight"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    model.classifier, source.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), source.eval()(images), rtol=0, atol=1e-4)


def test_a_file_of_cadene(tmp_path: Path) -> None:
    """Its images have blue first, those of this project red."""
    state = {name: tensor.float() for name, tensor in cadene_state(num_classes=10).items()}
    model = model_of(CADENE, seed=3)
    assert start(model, saved(state, tmp_path / "bn_inception.pth"), CADENE) == []
    stem = model.state_dict()["stem.0.0.weight"]
    assert torch.equal(stem, state["conv1_7x7_s2.weight"].flip(1))
    assert torch.equal(model.state_dict()["classifier.bias"], state["last_linear.bias"])


def test_auxiliary_heads_that_the_file_lacks_stay_random() -> None:
    source, config = model_of(SMALL, seed=1), replace(SMALL, auxiliary=True)
    model = model_of(config, seed=3)
    new = start(model, save(source.state_dict()), config, Path("a.safetensors"))
    assert new
    assert all(name.startswith("auxiliary.") for name in new)
    main = {name: tensor for name, tensor in model.state_dict().items() if name not in new}
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in main.items())


def of_checkpoint(config: ModelConfig) -> bytes:
    state = {"model": model_of(config, 1).state_dict(), "ema": None, "config": to_yaml(Config(model=config))}
    return checkpoint.encode(5, state)


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (lambda _: of_checkpoint(replace(SMALL, width=0.125)), "a.pt", r"They need --model\.width 0\.125$"),
        (lambda _: of_checkpoint(replace(SMALL, name="inception_v2")), "a.pt", r"need --model\.name inception_v2$"),
        (lambda p: saved(googlenet().state_dict(), p), "a.pt",
         r"--model\.stem imagenet --model\.branch5x5 3x3 --model\.variant torchvision$"),
        (lambda p: saved(cadene_state(), p), "a.pt", r"--model\.name inception_v2 .*--model\.variant cadene$"),
        (lambda _: save(model_of(replace(SMALL, width=0.125), 1).state_dict()), "a.safetensors",
         r"another network .*: stem\.0\.0\.weight is \(24, .* in the file and \(16, .* in the network;.* and \d+ more"),
        (lambda p: saved({"state_dict": {"x": torch.zeros(1)}}, p), "a.pt", r"another network .*weight is missing in"),
        (lambda p: saved({"epoch": 1}, p), "a.pt", r"holds no weights; it has epoch\.$"),
        (lambda p: saved([1, 2], p), "a.pt", r"holds a list"),
        (lambda p: saved({"x": Path("y")}, p), "a.pt", r"holds other objects than tensors, numbers and"),
        (lambda p: saved({0: torch.zeros(1)}, p), "a.pt", r"holds no weights; it has 0\.$"),
        (lambda _: b"", "a.pt", r"is no file of PyTorch, or is cut short\. Give a run"),
        (lambda _: b"run:\n  name: x\n", "a.pt", r"is no file of PyTorch, or is cut short\. Give a run"),
        (lambda _: b"<html>", "a.safetensors", r"a\.safetensors is damaged\. Give a run"),
    ],
)  # fmt: skip
def test_other_files_are_refused(data: Callable[[Path], bytes], path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        start(model_of(SMALL, seed=3), data(tmp_path / "file"), SMALL, Path(path))
    assert path in str(caught.value)


@pytest.mark.run
@pytest.mark.data
def test_a_run(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """On two processes, at a learning rate that changes nothing: it scores what the other run scored."""
    run_dir = tmp_path / "run"
    options = (*runs.SHORT, "--train.max_steps", "2", "--train.checkpoint_every_steps", "1", "--optim.lr", "1e-30",
               "--optim.name", "sgd", "--data.dir", data_dir, "--run.dir", run_dir, "--run.resume", "auto",
               "--model.weights", short_run)  # fmt: skip
    output = runs.run(2, *options)
    assert "starting from the weights in" in output
    found, expected = runs.summary(run_dir), runs.summary(short_run)
    assert found["model_sha256"] == expected["model_sha256"]
    assert found["test_confusion"] == expected["test_confusion"]
    newest = checkpoint.path_of(short_run / "checkpoints", 60)
    assert found["weights_sha256"] == checkpoint.digest_path(newest).read_text().split()[0]
    assert expected["weights_sha256"] is None
    # Resumed, it does not read the weights again.
    for name in ("summary.json", "checkpoints/step-00000002.pt"):
        (run_dir / name).unlink()
    output = runs.run(1, *options)
    assert "resuming from" in output
    assert "starting from" not in output
    assert json.loads((run_dir / "summary.json").read_text())["weights_sha256"] == found["weights_sha256"]
