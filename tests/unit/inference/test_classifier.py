"""How a model is made of a checkpoint, and what it says of its scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cifar_dist
from cifar_dist.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig, to_yaml
from cifar_dist.inference.classifier import Origin
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint
from cifar_dist.training.optim import Ema
from cifar_dist.training.summary import sha256_of_parameters
from cifar_dist.training.weights import copy_weights, decode

NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
SMALL = Config(model=ModelConfig(width=0.0625, auxiliary=True), train=TrainConfig(device="cpu"))


def saved(folder: Path, config: Config) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of random weights, and those that a loaded model should have."""
    torch.manual_seed(0)
    model = create_model(config.model)
    state: dict[str, Any] = {"config": to_yaml(config), "statistics": True, "model": model.state_dict()}
    state |= {"last_validation": None, "validation_due": False, "precision": config.train.precision}
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("auxiliary.")}
    if config.optim.ema_decay is not None:
        ema = Ema(create_model(replace(config.model, auxiliary=False)), config.optim.ema_decay)
        state["ema"], expected = ema.state_dict(), ema.module.state_dict()
    return checkpoint.write(folder, 5, checkpoint.encode(5, state)), expected


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_weights_are_those_that_are_scored(tmp_path: Path, ema_decay: float | None) -> None:
    """Without auxiliary classifiers; the moving average, if there is one."""
    path, expected = saved(tmp_path, replace(SMALL, optim=OptimConfig(ema_decay=ema_decay)))
    found = cifar_dist.load(path, device="cpu").network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("bf16", torch.float32, 0.02), ("fp32", torch.float32, 1e-5), ("fp64", torch.float64, 1e-12)],
)
def test_logits_do_not_depend_on_the_batch(
    tmp_path: Path, precision: Any, dtype: torch.dtype, tolerance: float
) -> None:
    """To rounding: on the processor that it was written on, to the bit."""
    path, _ = saved(tmp_path, replace(SMALL, train=replace(SMALL.train, precision=precision)))
    model = cifar_dist.load(path, device="cpu")
    images = model.preprocess(list(NOISE))
    assert images.dtype == dtype
    whole = model(images)
    assert whole.dtype == dtype
    assert model.precision.name == precision
    for size in (1, 3, 17):
        parts = torch.cat([model(part) for part in torch.split(images, size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)
    assert model(images[:0]).shape == (0, 10)
    assert model.predict([]) == []


@pytest.mark.parametrize(("trained", "precision"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_auto_means_what_it_meant_in_the_run(
    tmp_path: Path, trained: str, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the device is slow in it, which is said."""
    monkeypatch.setattr("cifar_dist.training.precision._cpu_has_bf16", lambda: True)
    path, _ = saved(tmp_path, SMALL)
    state = checkpoint.decode(path.read_bytes(), "")
    checkpoint.write(tmp_path, 5, checkpoint.encode(5, state | {"precision": trained}))
    assert cifar_dist.load(path, device="cpu").precision.name == precision
    note = "note: the run was trained in fp16, which this device lacks or is slow in; computing in bf16\n"
    assert capsys.readouterr().err == (note if trained == "fp16" else "")


def test_the_run_of_a_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name alone in its folder, and by a link elsewhere."""
    path, _ = saved(tmp_path / "run/checkpoints", SMALL)
    (tmp_path / "link.pt").symlink_to(path)
    monkeypatch.chdir(path.parent)
    for given in (path.name, tmp_path / "link.pt"):
        assert cifar_dist.load(given, device="cpu").origin.directory == tmp_path / "run"


class Extra(nn.Module):
    def __init__(self, _: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3072, num_classes)

    def get_extra_state(self) -> dict[str, int]:
        return {"classes": 10}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"classes": 10}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x.flatten(1))
        return logits


def test_a_state_dict_with_more_than_tensors(tmp_path: Path) -> None:
    config = replace(SMALL, model=ModelConfig(name=f"{__name__}:Extra"))
    path, expected = saved(tmp_path, config)
    assert torch.equal(cifar_dist.load(path, device="cpu").network.linear.weight, expected["linear.weight"])  # type: ignore[arg-type, union-attr]
    model = create_model(config.model)
    assert copy_weights(model, decode(path.read_bytes(), path), config.model, path) == []
    assert torch.equal(model.state_dict()["linear.weight"], expected["linear.weight"])


def test_the_digest_of_a_run_in_fp64(tmp_path: Path) -> None:
    config = replace(SMALL, train=replace(SMALL.train, precision="fp64"))
    path, _ = saved(tmp_path, config)
    state = checkpoint.decode(path.read_bytes(), "")
    network = create_model(config.model).double()
    network.load_state_dict(state["model"])
    for parameter in network.parameters():
        parameter.data *= 1 + 1e-12  # which fp32 does not hold
    checkpoint.write(tmp_path, 5, checkpoint.encode(5, state | {"model": network.state_dict()}))
    assert cifar_dist.load(path, device="cpu").origin.model_sha256 == sha256_of_parameters(network)


def test_a_model_that_was_moved(tmp_path: Path) -> None:
    """To another precision or device, by torch's own methods."""
    path, _ = saved(tmp_path, replace(SMALL, train=replace(SMALL.train, precision="bf16")))
    model = cifar_dist.load(path, device="cpu")
    expected = model(model.preprocess(list(NOISE)))
    images = model.double().preprocess(list(NOISE))
    assert images.dtype == model(images).dtype == model(images[:0]).dtype == torch.float64
    torch.testing.assert_close(model(images).float(), expected, rtol=0.1, atol=0.1)
    assert model.predict(NOISE[0])[0][0].name in model.classes
    assert torch.equal(model.float()(images), expected), "as the run again"
    assert model.to("meta").device.type == "meta"
    assert model.preprocess(list(NOISE)).device.type == model(images[:0]).device.type == "meta"


def test_a_validation_counts_for_its_own_step_only(tmp_path: Path) -> None:
    data = DataConfig(subset=1920)  # 60 steps of 32
    train = TrainConfig(batch_size=32, micro_batch_size=16, epochs=3)
    config = Config(data=data, train=train, eval=EvalConfig(every_epochs=2))
    validation = {"val/accuracy": 0.5, "val/loss": 1.0, "val/n": 5000}

    def scores(step: int, config: Config = config, due: bool = False) -> dict[str, float]:
        state = {"step": step, "last_validation": validation, "validation_due": due}
        return Origin(tmp_path / "step.pt", state, config, "").scores()

    assert scores(120) == scores(180) == validation
    assert scores(60) == scores(121) == scores(120, due=True) == {}
    assert scores(120, replace(config, data=replace(data, train_on="all"))) == {}
