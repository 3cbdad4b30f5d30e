"""What the scores of a test say: intervals of accuracies, accuracy of each class, calibration, confident mistakes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cifar_dist.reports.intervals import wilson

BINS = 10


class Prediction(NamedTuple):
    """One scored test image. `image`: its index in the test set; `probability`: of the predicted class."""

    image: int
    label: int
    predicted: int
    probability: float


class ClassScore(NamedTuple):
    """Of the `n` test images of one class."""

    correct: int
    n: int
    most_confused: int
    """The wrong class that was predicted most often."""
    num_most_confused: int


class Bin(NamedTuple):
    """Predictions whose probabilities lie in one interval of width 1 / BINS."""

    n: int
    confidence: float
    """Their mean probability."""
    accuracy: float
    interval: tuple[float, float]


def class_scores(confusion: Sequence[Sequence[int]]) -> list[ClassScore]:
    """From a confusion matrix with a row per true class and a column per predicted one.

    Raises:
        ValueError: it is no square matrix of counts.
    """
    if not confusion or any(len(row) != len(confusion) or min(row) < 0 for row in confusion):
        raise ValueError("the confusion matrix is not square")
    scores = []
    for label, row in enumerate(confusion):
        others = {other: count for other, count in enumerate(row) if other != label}
        worst = max(others, key=lambda other: others[other])
        scores.append(ClassScore(row[label], sum(row), worst, others[worst]))
    return scores


def read_predictions(path: Path) -> list[Prediction]:
    """The lines of a predictions.csv.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = [_prediction(row) for row in reader]
    if not found:
        raise ValueError(f"{path.name} has no lines")
    return found


def _prediction(row: Mapping[str, Any]) -> Prediction:
    try:
        found = Prediction(int(row["image"]), int(row["label"]), int(row["predicted"]), float(row["probability"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"predictions.csv has the line {','.join(map(str, row.values()))!r:.80}") from None
    if not (0 <= found.probability <= 1 and 0 <= found.label < 10 and 0 <= found.predicted < 10):
        raise ValueError(f"predictions.csv has impossible values for image {found.image}")
    return found


def calibration(predictions: Sequence[Prediction]) -> tuple[list[Bin], float]:
    """The bins that hold predictions, and the expected calibration error.

    That is the mean distance between confidence and accuracy of the bins, weighted by their numbers of images; see
    Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
    """
    groups: dict[int, list[Prediction]] = {}
    for each in predictions:
        groups.setdefault(min(int(each.probability * BINS), BINS - 1), []).append(each)
    bins = []
    for _, group in sorted(groups.items()):
        accuracy = fmean(each.label == each.predicted for each in group)
        confidence = fmean(each.probability for each in group)
        bins.append(Bin(len(group), confidence, accuracy, wilson(accuracy, len(group))))
    return bins, sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / len(predictions)


def mistakes(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The wrong ones, the most confident first; the order of the cells of mistakes.png."""
    wrong = [each for each in predictions if each.label != each.predicted]
    return sorted(wrong, key=lambda each: (-each.probability, each.image))
