"""Exports of small checkpoints: own networks, a moving average, fp64; and what happens to files in the folder."""

from __future__ import annotations

import errno
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn

from cifar_dist import export as command
from cifar_dist.config import Config, ModelConfig, OptimConfig, TrainConfig, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.files import sha256_of_file, write_bytes_atomic, write_json
from cifar_dist.inference import export as module
from cifar_dist.inference import formats
from cifar_dist.inference.export import Options, Request, export
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint
from cifar_dist.training.optim import Ema
from cifar_dist.training.summary import sha256_of_parameters, versions

QUICK = ["safetensors", "torch_export"]


class Own(nn.Module):
    """With two layers that share their weights."""

    def __init__(self, _: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)
        self.b.weight = self.a.weight
        self.last = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.b(self.a(self.first(x)).relu()).relu())
        return logits


class NotTraceable(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x.flatten(1)[:, :10]


class Locked(Own):
    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.lock = threading.Lock()


OWN = ModelConfig(name=f"{__name__}:Own")


def saved(run: Path, model: ModelConfig = OWN, seed: int = 0, **state: Any) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoint of a run without training, and the weights that its export should have."""
    torch.manual_seed(seed)
    config = Config(model=model, train=TrainConfig(precision="fp64" if state.get("precision") == "fp64" else "auto"))
    network = create_model(model)
    if config.train.precision == "fp64":
        network.double()
        for parameter in network.parameters():
            parameter.data *= 1 + 1e-12
    expected = network.state_dict()
    if "ema_decay" in state:
        config = replace(config, optim=OptimConfig(ema_decay=state.pop("ema_decay")))
        average = Ema(create_model(model), 0.9)
        state["ema"], expected = average.state_dict(), average.module.state_dict()
    rest: dict[str, Any] = {"statistics": True, "last_validation": None, "validation_due": False, "precision": "fp32"}
    rest |= {"config": to_yaml(config), "model": network.state_dict()}
    path = checkpoint.write(run / "checkpoints", 5, checkpoint.encode(5, rest | state))
    figures = {"steps": 5, "model_sha256": sha256_of_parameters(network), "test_accuracy": 0.5, "test_n": 500}
    machine = {"git_commit": None, "versions": versions(), "device_names": ["a"], "world_size": 1, "precision": "fp32"}
    write_json(run / "summary.json", figures | machine)
    return path, expected


def exported(path: Path, out: Path, formats: list[str], options: Options | None = None) -> list[str]:
    """Checked with random images."""
    return export(Request(path, formats, out=out, data_dir=out, options=options or Options()), lambda _: None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def has(folder: Path, weights: dict[str, Tensor]) -> bool:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    return all(torch.equal(found[name], value.float() if value.ndim else value) for name, value in weights.items())


def test_an_own_network(tmp_path: Path) -> None:
    secret = tmp_path / "secret.pt"
    path, expected = saved(tmp_path, replace(OWN, weights=secret), precision="fp16", weights_sha256="abc123")
    out = tmp_path / "export"
    assert exported(path, out, list(formats.FILES)) == []
    files = {"model.safetensors", "model.onnx", "model.pt2"}
    assert names(out) == files | {"config.json", "README.md"}
    assert settings(out)["files"] == {name: sha256_of_file(out / name) for name in {*files, "README.md"}}
    assert has(out, expected)
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["cifar10", "pytorch"]
    assert f"Trained with cifar_dist; {OWN.name}, step 5." in card.text
    assert "model.safetensors has no model.py" in card.text
    assert "| the run | fp16 | 50.00% | 500 test images |" in card.text, "whatever this machine would choose"
    assert "- started from the weights in a FILE with the SHA-256 abc123\n" in card.text
    assert "--run.name mine --model.weights FILE\n" in card.text
    assert "secret" not in card.text
    assert "No test image was used" not in card.text


def test_formats_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one message, and the others are written."""
    path, _ = saved(tmp_path, ModelConfig(name=f"{__name__}:NotTraceable"))
    monkeypatch.setattr(sys, "argv", ["export", str(path), "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1] for error in errors] == [" onnx is not written", " torch_export is not written"]
    assert names(tmp_path / "export") == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("kind", [{"ema_decay": 0.9}, {"precision": "fp64"}])
def test_a_moving_average_and_fp64(tmp_path: Path, kind: dict[str, Any]) -> None:
    out = tmp_path / "export"
    plain, _ = saved(tmp_path / "plain")
    assert exported(plain, out, QUICK) == []
    before = settings(out)
    path, expected = saved(tmp_path / "other", **kind)
    assert exported(path, out, ["safetensors"]) == []
    assert names(out) == {"model.safetensors", "config.json", "README.md"}, "model.pt2 was of the other"
    assert has(out, expected)
    after = settings(out)
    assert after["model_sha256"] == json.loads((tmp_path / "other/summary.json").read_text())["model_sha256"]
    assert "| the run | " in (out / "README.md").read_text(), "so summary.json counts as its own"
    if "ema_decay" in kind:
        assert after["model_sha256"] == before["model_sha256"]
        assert after["network_sha256"] != before["network_sha256"]


def test_nothing_to_merge(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(UserError, match="merge_1x1 is for networks of Inception modules"):
        exported(path, tmp_path / "export", QUICK, Options(merge_1x1=True))
    assert names(tmp_path / "export") == set()


def test_a_network_that_cannot_be_copied(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, ModelConfig(name=f"{__name__}:Locked"))
    with pytest.raises(UserError, match=r"the network to export failed: TypeError: cannot pickle '_thread\.lock'"):
        exported(path, tmp_path / "export", QUICK)


def test_a_full_disk_leaves_files_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "export"
    first, old = saved(tmp_path / "first", seed=1)
    second, new = saved(tmp_path / "second", seed=2)

    def full(path: Path, data: bytes) -> None:
        if path.name == "model.pt2":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes_atomic(path, data)

    for path, weights in ((second, new), (first, old), (first, old)):  # into an empty folder, of another, of the same
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_bytes_atomic", full)
            with pytest.raises(UserError, match=f"the folder {out} cannot be written: No space left on device"):
                exported(path, out, QUICK)
        assert names(out) == {"model.safetensors", "config.json"}
        assert has(out, weights)
        network = settings(out)["network_sha256"]
        assert exported(path, out, QUICK) == []
        assert names(out) == {"model.safetensors", "model.pt2", "config.json", "README.md"}
        assert settings(out)["network_sha256"] == network


def test_files_of_earlier_exports_and_of_the_user(tmp_path: Path) -> None:
    out = tmp_path / "export"
    path, _ = saved(tmp_path)
    assert exported(path, out, ["torch_export"]) == []
    pt2 = sha256_of_file(out / "model.pt2")
    assert exported(path, out, ["safetensors"]) == []
    assert settings(out)["files"]["model.pt2"] == pt2 == sha256_of_file(out / "model.pt2")
    assert "| model.pt2 |" in (out / "README.md").read_text()
    (out / "other.txt").touch()
    assert exported(path, out, ["safetensors"], Options(fold_batch_norm=True)) == []
    assert names(out) == {"model.safetensors", "config.json", "README.md", "other.txt"}
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    for name, text in (("model.py", "mine"), ("README.md", "changed"), ("config.json", "{}"), ("model.onnx", "")):
        (out / name).write_text(text)
        with pytest.raises(
            UserError, match=rf"holds .*{name}.*, which no export wrote, or which changed since. Choose another --out"
        ):
            exported(path, out, QUICK)
        assert (out / name).read_text() == text
        (out / name).unlink()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {
            k: v for k, v in content.items() if k != name
        }
        if name in content:
            (out / name).write_bytes(content[name])
