"""Recalibration and scoring against the same by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import EvalConfig
from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World
from cifar_dist.training.evaluation import Evaluator
from cifar_dist.training.precision import Precision

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


FP32, FP64 = Precision("fp32", "cpu"), Precision("fp64", "cpu")


def evaluator(model: nn.Module, chunk_size: int, precision: Precision = FP64) -> Evaluator:
    return Evaluator(model, EvalConfig(batch_size=chunk_size), precision, ALONE)


def test_recalibrated_statistics_are_those_of_the_samples(data_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)).double().train()
    samples = np.arange(1000)
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        evaluator(model, 250).recalibrate(loader, samples)
        batch = next(iter(loader.read(samples, 1000)))
    images = normalize(batch.images, torch.float64)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, images.mean(dim=(0, 2, 3)), atol=1e-12)
    chunks = images.view(4, 250, 3, 32, 32).var(dim=(1, 3, 4)).mean(dim=0)
    assert torch.allclose(norm.running_var, chunks, rtol=1e-12)
    assert model.training


def test_score_counts_each_sample_once(data_dir: Path) -> None:
    seen: list[torch.Tensor] = []

    class FirstPixel(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return nn.functional.one_hot((images[:, 0, 0, 0] > 0).long(), 10).double()

    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluator(FirstPixel(), 100, FP32).score(loader, np.arange(1003), "flip")
        batch = next(iter(loader.read(np.arange(1003), 1003)))
    assert torch.equal(torch.cat(seen[::2]), normalize(batch.images, torch.float32))
    assert torch.equal(torch.cat(seen[1::2]), normalize(batch.images, torch.float32).flip(3))
    bright = (batch.images[:, 0, 0, 0].double() > 125.307).long()
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, bright), torch.ones(1003, dtype=torch.int64), accumulate=True)
    assert result.n == 1003
    assert result.confusion == confusion.tolist()
    assert result.confusion_tta is not None
    assert sum(map(sum, result.confusion_tta)) == 1003
    certain = round(1e6 * math.e / (math.e + 9))  # of a logit of 1 beside nine of 0
    assert torch.equal(result.answers, torch.stack((batch.labels, bright, torch.full_like(bright, certain)), dim=1))
    assert result.accuracy == (bright == batch.labels).sum().item() / 1003


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_an_infinite_loss_is_no_number(value: float, data_dir: Path) -> None:
    """One logit of one sample of the second chunk; the counts are all there."""

    class Spoiled(nn.Module):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            logits = torch.zeros(len(images), 10, dtype=images.dtype)
            logits[0, 0] = value if self.calls == 2 else 0.0
            return logits

    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluator(Spoiled(), 100).score(loader, np.arange(300))
    assert math.isnan(result.loss)
    assert sum(map(sum, result.confusion)) == 300


@pytest.mark.parametrize("training", [True, False], ids=["in training", "in evaluation"])
def test_scoring_is_in_evaluation_mode(training: bool, data_dir: Path) -> None:
    """With the running statistics and without dropout, whatever mode the model is in, which it keeps."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10)).double().train(training)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluator(model, 100).score(loader, np.arange(300))
        batch = next(iter(loader.read(np.arange(300), 300)))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mean, variance = (x.view(3, 1, 1) for x in (before["0.running_mean"], before["0.running_var"]))
    images = (normalize(batch.images, torch.float64) - mean) / (variance + norm.eps).sqrt()
    logits = images.flatten(1) @ before["3.weight"].T + before["3.bias"]
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, logits.argmax(dim=1)), torch.ones(300, dtype=torch.int64), accumulate=True)
    assert result.confusion == confusion.tolist()
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, batch.labels).item(), rel=1e-8)


def test_six_views_are_flips_and_shifts_by_a_pixel(data_dir: Path) -> None:
    """A network that only sees the corner pixel, whose six views are weighted by hand."""

    class Corner(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(images[:, :, 0, 0].double(), (0, 7))

    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluator(Corner(), 100).score(loader, np.arange(300), "six")
        batch = next(iter(loader.read(np.arange(300), 300)))
    pixels = normalize(batch.images, torch.float64)
    # Down right brings the reflected (1, 1) to the corner, up left what was at (1, 1); mirrored: the other side.
    logits = pixels[:, :, 0, 0] + pixels[:, :, 0, 31] + pixels[:, :, 1, 1] + pixels[:, :, 1, 30]
    guesses = torch.nn.functional.pad(logits, (0, 7)).argmax(dim=1)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, guesses), torch.ones(300, dtype=torch.int64), accumulate=True)
    assert result.confusion_tta == confusion.tolist()
    assert result.confusion_tta != result.confusion
