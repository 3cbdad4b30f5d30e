"""curves.png from real metrics files, drawn by matplotlib and read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.tracking.curves import TEST, TRAIN, VALIDATION, draw_curves

RUN: list[dict[str, object]] = [
    {
        "step": step, "epoch": step / 43, "lr": 0.4 * (1 - step / 860), "images_per_second": 512.0,
        "train/loss": 2.2 - step / 600, "train/accuracy": step / 900,
    }
    for step in range(20, 861, 20)
]  # fmt: skip
VALIDATIONS: list[dict[str, object]] = [
    {
        "step": step,
        "epoch": step / 43,
        "val/loss": 2.3 - step / 700,
        "val/accuracy": step / 950,
        "val/n": 5000,
    }
    for step in (215, 430, 645, 860)
]
FINAL: list[dict[str, object]] = [{"step": 860, "test/accuracy": 0.9012, "test/accuracy_tta": 0.9044, "test/n": 10000}]


def write(path: Path, records: Sequence[dict[str, object]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def num_pixels(picture: Path, colour: str, panel: int) -> int:
    """Pixels of exactly that colour in the given third of the picture."""
    image = np.asarray(Image.open(picture).convert("RGB"))
    third = image[:, panel * 520 : (panel + 1) * 520]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return int((third == (red, green, blue)).all(axis=-1).sum())


def test_all_series_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    out.write_text("an older picture")
    draw_curves(write(tmp_path / "metrics.jsonl", RUN + VALIDATIONS + FINAL), out, "inception_v1")
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == (1560, 540)
    drawn = {
        name: [num_pixels(out, colour, panel) > 40 for panel in range(3)]
        for name, colour in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    }
    assert drawn == {
        "train": [True, True, True],
        "validation": [True, True, False],
        "test": [False, True, False],
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_no_validation(tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    draw_curves(write(tmp_path / "metrics.jsonl", RUN), out, "train_on all")
    assert num_pixels(out, TRAIN, 0) > 40
    assert [num_pixels(out, VALIDATION, panel) for panel in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("records", "tail", "visible"),
    [
        ([], "", [False, False, False]),
        (RUN[:1], "", [True, True, True]),
        ([{"step": 20, "epoch": None, "train/loss": None, "lr": None}], "", [False, False, False]),
        ([{"step": 20, "train/loss": "nan"}, {"step": 40, "train/loss": 1.5}], "", [True, False, False]),
        ([*RUN, {"step": 880, "train/loss": "inf"}, {"step": 900, "train/loss": "-inf"}], "", [True, True, True]),
        (RUN[:1], '{"step": 40, "train/lo', [True, True, True]),
        ([], "not json\n[1]\n", [False, False, False]),
    ],
    ids=["empty", "one line", "nulls", "nan", "infinite", "torn", "rubbish"],
)
def test_odd_files(tmp_path: Path, records: list[dict[str, object]], tail: str, visible: list[bool]) -> None:
    out = tmp_path / "curves.png"
    draw_curves(write(tmp_path / "metrics.jsonl", records, tail), out, "odd")
    assert [num_pixels(out, TRAIN, panel) > 5 for panel in range(3)] == visible


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        draw_curves(tmp_path / "none.jsonl", tmp_path / "curves.png", "none")


def test_pyplot_is_not_loaded(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", RUN)
    code = (
        "import sys; from pathlib import Path; from cifar_dist.tracking.curves import draw_curves\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        "draw_curves(Path(sys.argv[1]), Path(sys.argv[2]), 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    arguments = [sys.executable, "-c", code, str(metrics), str(tmp_path / "curves.png")]
    subprocess.run(arguments, check=True, timeout=60)
