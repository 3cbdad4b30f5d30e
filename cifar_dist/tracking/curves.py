"""curves.png: loss, accuracy and learning rates from metrics.jsonl."""

from __future__ import annotations

import io
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.files import write_bytes_atomic
from cifar_dist.tracking.metrics_file import Record, number, read_records, steps_per_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable for the colour-blind; one per series, in every panel.
TRAIN, VALIDATION, TEST = "#0072B2", "#D55E00", "#009E73"
RATES = (TRAIN, "#E69F00", "#CC79A7", "#56B4E9", "#000000")
RATE_NAMES = {"lr": "SGD", "lr/biases": "SGD, biases", "lr/muon": "Muon"}
INK, GRID = "#333333", "#dddddd"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white", "figure.constrained_layout.w_pad": 0.14, "text.color": INK,
    "legend.frameon": False, "legend.fontsize": 9,
    "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": INK, "xtick.labelsize": 9, "ytick.color": INK, "ytick.labelsize": 9,
    "lines.linewidth": 1.8, "lines.markeredgecolor": "white", "lines.markeredgewidth": 0.6, "lines.markersize": 4.5,
}  # fmt: skip


@contextmanager
def picture(out: Path, height: float, parse_math: bool = True) -> Iterator[Figure]:
    """A figure to draw on, 13 inches wide and `height` high at 120 dots per inch, which becomes the PNG `out`.

    Args:
        parse_math: whether text between dollar signs is a formula, as matplotlib's labels of logarithmic axes are.

    Raises:
        OSError: the file cannot be written; it is replaced atomically.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is inherited, and may not exist here
    # The object interface: pyplot keeps global state and chooses a window system.
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    style = STYLE | {"text.parse_math": parse_math}
    with rc_context(dict(rcParamsDefault) | style), warnings.catch_warnings():  # not the user's matplotlibrc
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a name; a box stands for it
        figure = Figure(figsize=(13, height), dpi=120, layout="constrained")
        yield figure
        figure.savefig(buffer, format="png")
    write_bytes_atomic(out, buffer.getvalue())


def draw_curves(metrics_path: Path, out: Path, title: str) -> None:
    """Draw loss, accuracy in % and learning rates over the steps, with the epochs along the top.

    Null and missing values are skipped; a loss that is not finite breaks its line.

    Args:
        metrics_path: a metrics.jsonl, also of a running run.
        out: the PNG, 1560 x 540 pixels; replaced atomically.

    Raises:
        OSError: the metrics cannot be read, or the file cannot be written.
    """
    records = read_records(metrics_path)
    with picture(out, 4.5) as figure:
        figure.suptitle(title, fontsize=12, parse_math=False)
        loss, accuracy, rate = figure.subplots(1, 3)
        plain = all("train/objective" in record for record in records if "train/loss" in record)
        _line(loss, records, "train/loss", "training" if plain else "training (older: with label smoothing)", TRAIN)
        _line(loss, records, "val/loss", "validation", VALIDATION, marked=True)
        _line(accuracy, records, "train/accuracy", "training", TRAIN, scale=100)
        _line(accuracy, records, "val/accuracy", "validation", VALIDATION, scale=100, marked=True)
        _test_point(accuracy, records)
        _rates(rate, records)
        for axes, name in ((loss, "cross-entropy"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
            _furnish(axes, name, steps_per_epoch(records))


def _line(
    axes: Axes, records: list[Record], key: str, label: str, colour: str, *, scale: float = 1, marked: bool = False
) -> None:
    steps, values = [], []
    for record in records:
        value = number(record.get(key))
        if value is not None:
            steps.append(record["step"])
            values.append(scale * value)
    if steps:
        # A single value makes no line, so it needs a marker to be seen.
        marker = "o" if marked or sum(map(math.isfinite, values)) < 2 else ""
        axes.plot(steps, values, color=colour, label=label, marker=marker, zorder=3 if marked else 2)


def _rates(axes: Axes, records: list[Record]) -> None:
    """The learning rates of all groups, on a logarithmic axis where one is far above another."""
    keys = dict.fromkeys(key for record in records for key in record if key == "lr" or key.startswith("lr/"))
    names = RATE_NAMES if keys.keys() <= RATE_NAMES.keys() else {}  # those of own optimizers have numbers
    for key, colour in zip(keys, itertools.cycle(RATES), strict=False):
        _line(axes, records, key, names.get(key, key) if len(keys) > 1 else "", colour)
    highest = [max(number(record.get(key)) or 0.0 for record in records) for key in keys]
    if highest and max(highest) > 10 * min(highest) > 0:
        axes.set_yscale("log")
    elif highest:
        axes.set_ylim(bottom=0)


def _test_point(axes: Axes, records: list[Record]) -> None:
    for record in records:  # at most one has it
        if record.get("test/accuracy") is not None:
            value, augmented = 100 * record["test/accuracy"], record.get("test/accuracy_tta")
            further = "" if augmented is None else f"\n(with test-time augmentation {100 * augmented:.2f} %)"
            label = f"test: {value:.2f} %{further}"
            axes.plot(record["step"], value, "D", color=TEST, label=label, markersize=7, zorder=4, clip_on=False)


def _furnish(axes: Axes, name: str, per_epoch: float | None) -> None:
    import numpy as np

    axes.set_xlabel("step")
    axes.set_ylabel(name)
    if not axes.lines:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    if per_epoch is not None:
        k = per_epoch
        top = axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, k), lambda x: np.multiply(x, k)))
        top.set_xlabel("epoch")
        top.spines["top"].set_visible(False)
