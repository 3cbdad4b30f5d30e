"""Files of a finished run that its report reads, made from its summary.json."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_dist.data import cifar10
from cifar_dist.data.prepare import beton
from cifar_dist.files import write_json
from cifar_dist.reports.scores import Prediction, mistakes
from tests.support import runs


def write_predictions(run_dir: Path, data_dir: Path) -> list[Prediction]:
    """predictions.csv that fits test_confusion, and mistakes.png and filters.png; the predictions."""
    images, labels = beton.read_arrays(data_dir / cifar10.TEST)
    draw = random.Random(0)
    found = []
    for label, row in enumerate(runs.summary(run_dir)["test_confusion"]):
        unused = iter(np.flatnonzero(labels == label).tolist())
        found += [
            Prediction(next(unused), label, predicted, round(draw.uniform(0.1, 1), 6))
            for predicted, count in enumerate(row)
            for _ in range(count)
        ]
    found.sort()
    lines = [f"{image},{label},{predicted},{probability:.6f}\n" for image, label, predicted, probability in found]
    (run_dir / "predictions.csv").write_text("image,label,predicted,probability\n" + "".join(lines))
    sheet = np.full((4 * 32, 6 * 32, 3), 255, "u1")
    for k, each in enumerate(mistakes(found)[:24]):
        top, left = k // 6 * 32, k % 6 * 32
        sheet[top : top + 32, left : left + 32] = images[each.image]
    Image.fromarray(sheet).save(run_dir / "mistakes.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (7, 63, 3)).astype("u1")).save(run_dir / "filters.png")
    return found


def change_summary(run_dir: Path, **values: object) -> None:
    write_json(run_dir / "summary.json", runs.summary(run_dir) | values)
