"""Exported files and their checks. tests/runs/test_inference.py uses them without cifar_dist."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cifar_dist.data import augment
from cifar_dist.errors import UserError
from cifar_dist.inference import export, formats
from cifar_dist.inference.variants import FromUint8, prepare
from cifar_dist.models.architectures import V1, V2, inception_v1, inception_v2
from cifar_dist.models.layers import DEFAULT, TORCHVISION, Variant
from cifar_dist.training.weights import decode
from tests.unit.inference.test_variants import trained

PLAIN = {"fold_batch_norm": False, "merge_1x1": False, "uint8_input": False}
ALL = dict.fromkeys(PLAIN, True)
SETTINGS = {"model": {}, "classes": list("abcdefghij"), "mean": augment.MEAN, "std": augment.STD, "width": 0.0625}
V1_WHITEN = {**SETTINGS, "rows": V1, "branch5x5": "paper", "stem": "whiten", "variant": asdict(DEFAULT)}
V2_CIFAR = {**SETTINGS, "rows": V2, "branch5x5": "double3x3", "stem": "cifar", "variant": asdict(TORCHVISION)}


def write(
    format_: str, folder: Path, settings: dict[str, Any], options: dict[str, bool]
) -> tuple[nn.Module, export.Samples, Callable[[], nn.Module]]:
    """Write the files of a network of random weights. Returns it, 64 random images, and what makes the variant."""
    torch.manual_seed(0)
    make = inception_v1 if settings["rows"] is V1 else inception_v2
    network = trained(make(width=0.0625, stem=settings["stem"], variant=Variant(**settings["variant"])))
    plain = partial(prepare, network, options["fold_batch_norm"], options["merge_1x1"])
    model = FromUint8(plain(), augment.MEAN, augment.STD) if options["uint8_input"] else plain()
    formats.write(format_, folder, model, {**settings, **options})
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    return network, export.Samples(images, None, "random images"), plain


@pytest.mark.parametrize(
    ("format_", "settings", "options"),
    [
        ("safetensors", V1_WHITEN, PLAIN),
        ("safetensors", V1_WHITEN, ALL),
        ("safetensors", V2_CIFAR, ALL),
        ("onnx", V2_CIFAR, ALL),
        ("torch_export", V2_CIFAR, ALL),
        pytest.param("onnx", V1_WHITEN, ALL, marks=pytest.mark.slow),
        pytest.param("torch_export", V1_WHITEN, ALL, marks=pytest.mark.slow),
    ],
)
def test_files_compute_what_the_network_computes(
    tmp_path: Path, format_: str, settings: dict[str, Any], options: dict[str, bool]
) -> None:
    network, samples, plain = write(format_, tmp_path, settings, options)
    text = export.check(format_, tmp_path, network, samples, plain)
    assert "top-1 equal on 64 of 64 random images" in text
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == set(formats.FILES[format_])
    dtype = torch.uint8 if options["uint8_input"] else torch.float32
    for n in (1, 7):
        assert formats.outputs(format_, tmp_path, torch.zeros(n, 3, 32, 32, dtype=dtype), plain).shape == (n, 10)


def test_wrong_files_are_detected(tmp_path: Path) -> None:
    network, samples, plain = write("safetensors", tmp_path, V1_WHITEN, PLAIN)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    bias = weights["classifier.bias"]
    for value in (bias[0] + 2e-4, torch.tensor(float("nan"))):
        save_file({**weights, "classifier.bias": torch.cat((value[None], bias[1:]))}, path)
        with pytest.raises(
            export.CheckError, match=r"logits differ .* by at most (2\.0e-04|nan), .*; valid: below 1e-04"
        ):
            export.check("safetensors", tmp_path, network, samples, plain)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(export.CheckError, match="it cannot be read back: SafetensorError"):
        export.check("safetensors", tmp_path, network, samples, plain)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    formats.require_packages(["safetensors", "onnx", "torch_export"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    formats.require_packages(["safetensors", "torch_export"])
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime is not .*pip install 'cifar_dist\[export\]'"):
        formats.require_packages(["safetensors", "onnx"])


def test_random_images_where_there_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says why; the card, which is published, names no folder."""
    (tmp_path / "test.beton").write_bytes(b"something else")
    lines = list[str]()
    samples = export._samples(None, tmp_path, lines.append)
    assert samples.images.shape == (1000, 3, 32, 32)
    assert samples.labels is None
    assert samples.told == "random images"

    def refuse(_: Path) -> str:  # root may read every file
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(export, "sha256_of_file", refuse)
    assert export._samples(None, tmp_path, lines.append).labels is None
    reasons = ("is missing or not CIFAR-10", "cannot be read (Permission denied)")
    assert lines == [f"checking with random images, as {tmp_path}/test.beton {why}" for why in reasons]
    with pytest.raises(UserError, match=r"test\.beton cannot be read \(Permission denied\)\. Choose another"):
        export._samples(tmp_path, tmp_path / "other", lines.append)


def test_weights_of_a_variant_are_no_start(tmp_path: Path) -> None:
    write("safetensors", tmp_path, V1_WHITEN, {**PLAIN, "fold_batch_norm": True})
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"was exported with --fold_batch_norm\. Export it without, or give the run"):
        decode(path.read_bytes(), path)
    write("safetensors", tmp_path, V1_WHITEN, PLAIN)
    assert decode(path.read_bytes(), path).tensors
