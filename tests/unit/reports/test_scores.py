"""Intervals, classes, calibration and mistakes, against values computed by hand or by SciPy."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.reports.intervals import wilson
from cifar_dist.reports.scores import Bin, ClassScore, Prediction, calibration, class_scores, mistakes, read_predictions


def test_class_scores() -> None:
    assert class_scores([[5, 2, 3], [0, 9, 1], [4, 4, 2]]) == [
        ClassScore(5, 10, 2, 3), ClassScore(9, 10, 2, 1), ClassScore(2, 10, 0, 4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not square"):
        class_scores([[1, 2], [3]])


def test_calibration() -> None:
    found = [Prediction(0, 0, 0, 0.95), Prediction(1, 0, 1, 0.91), Prediction(2, 3, 3, 0.35), Prediction(3, 4, 4, 1.0)]
    bins, error = calibration(found)
    assert bins[0] == Bin(1, 0.35, 1.0, wilson(1, 1))
    assert bins[1][:3] == pytest.approx((3, (0.95 + 0.91 + 1) / 3, 2 / 3))
    assert bins[1].interval == pytest.approx(wilson(2 / 3, 3))
    assert len(bins) == 2
    assert error == pytest.approx(0.25 * 0.65 + 0.75 * ((0.95 + 0.91 + 1) / 3 - 2 / 3))


def test_mistakes_are_sorted_as_their_pictures() -> None:
    found = [Prediction(0, 0, 0, 1.0), Prediction(1, 0, 1, 0.5), Prediction(7, 0, 1, 0.9), Prediction(3, 0, 1, 0.9)]
    assert [each.image for each in mistakes(found)] == [3, 7, 1]


def test_read_predictions(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("image,label,predicted,probability\n0,3,5,0.250000\n2,9,9,0.990000\n")
    assert read_predictions(path) == [Prediction(0, 3, 5, 0.25), Prediction(2, 9, 9, 0.99)]


@pytest.mark.parametrize("text", [
    "", "image,label,predicted,probability\n", "image,label\n0,1\n", "image,label,predicted,probability\n0,1,2,x\n",
    "image,label,predicted,probability\n0,1,10,0.5\n", "image,label,predicted,probability\n0,1,2,nan\n",
    "image,label,predicted,probability\n0,1,2,0.5\n1,2", "\x00\x01",
])  # fmt: skip
def test_damaged_predictions(text: str, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(ValueError, match=r"predictions\.csv has"):
        read_predictions(tmp_path / "predictions.csv")
