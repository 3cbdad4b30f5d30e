"""Answers and pictures of small scores; whole runs are in tests/runs/test_run.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.data.loader import BetonLoader
from cifar_dist.models.architectures import create_model
from cifar_dist.training import predictions
from cifar_dist.training.evaluation import Score

SAMPLES = np.array([3, 5, 8, 13, 21])


def score(*answers: tuple[int, int, int]) -> Score:
    return Score(len(answers), 1.0, [], None, torch.tensor(answers))


def test_worst_mistakes_first() -> None:
    """By probability, then by number; what is right is left out."""
    found = score((1, 1, 900_000), (2, 1, 500_000), (0, 4, 700_000), (7, 8, 500_000), (9, 9, 100_000))
    assert predictions.worst_mistakes(found, SAMPLES).tolist() == [8, 5, 13]


def test_answers_are_lines(tmp_path: Path) -> None:
    predictions.write_answers(tmp_path / "a.csv", score((1, 1, 1_000_000), (2, 1, 500_001)), SAMPLES[:2])
    assert (tmp_path / "a.csv").read_text() == "image,label,predicted,probability\n3,1,1,1.000000\n5,2,1,0.500001\n"


def test_a_perfect_score_has_a_white_picture(data_dir: Path, tmp_path: Path) -> None:
    with BetonLoader(data_dir / "test.beton", torch.device("cpu")) as loader:
        predictions.write_mistakes(tmp_path / "m.png", score((1, 1, 900_000)), SAMPLES[:1], loader)
    assert bool((np.asarray(Image.open(tmp_path / "m.png")) == 255).all())


@pytest.mark.parametrize(("stem", "size"), [("cifar", 3), ("whiten", 4), ("imagenet", 7)])
def test_filters_of_each_stem(stem: str, size: int, tmp_path: Path) -> None:
    """The extremes of each filter are black and white."""
    model = create_model(ModelConfig(stem=stem, width=0.25))  # type: ignore[arg-type]
    predictions.write_filters(tmp_path / "f.png", model)
    pixels = np.asarray(Image.open(tmp_path / "f.png"))
    assert pixels.shape[1] == 16 * (size + 1) - 1
    first = pixels[:size, :size]
    assert (first.min(), first.max()) == (0, 255)
    assert bool((pixels[:, size] == 255).all())


def test_a_network_without_filters_of_colours(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="three channels"):
        predictions.write_filters(tmp_path / "f.png", nn.Linear(3, 3))
