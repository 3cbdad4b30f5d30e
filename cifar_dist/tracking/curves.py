"""curves.png: loss, accuracy and learning rate from metrics.jsonl."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.errors import UserError
from cifar_dist.files import write_bytes_atomic
from cifar_dist.tracking.metrics_file import Record, number, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinguishable for the colour-blind; one per series, in every panel.
TRAIN, VALIDATION, TEST = "#0072B2", "#D55E00", "#009E73"
INK, GRID = "#333333", "#dddddd"

Points = tuple[list[int], list[float]]


def draw_curves(metrics_path: Path, out: Path, title: str) -> None:
    """Draw loss, accuracy in % and learning rate over the steps, with the epochs along the top.

    Null and missing values are skipped; a loss that is not finite breaks its line.

    Args:
        metrics_path: a metrics.jsonl, also of a running run.
        out: the PNG, 1560 x 540 pixels; replaced atomically.

    Raises:
        UserError: the metrics cannot be read, or the file cannot be written.
    """
    # The object interface: pyplot keeps global state and chooses a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_records(metrics_path)
    figure = Figure(figsize=(13, 4.5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.14), facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    loss, accuracy, rate = figure.subplots(1, 3)
    _line(loss, _points(records, "train/loss"), "training", TRAIN)
    _line(loss, _points(records, "val/loss"), "validation", VALIDATION, marked=True)
    _line(accuracy, _points(records, "train/accuracy", 100), "training", TRAIN)
    _line(accuracy, _points(records, "val/accuracy", 100), "validation", VALIDATION, marked=True)
    _test_point(accuracy, records)
    _line(rate, _points(records, "lr"), "", TRAIN)
    steps_per_epoch = _steps_per_epoch(records)
    for axes, name in ((loss, "loss (cross-entropy)"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        _furnish(axes, name, steps_per_epoch)
    rate.set_ylim(bottom=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # attaches itself to the figure
    figure.savefig(buffer, format="png")
    try:
        write_bytes_atomic(out, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the curves {out}: {error.strerror or error}.") from error


def _points(records: list[Record], key: str, scale: float = 1) -> Points:
    steps, values = [], []
    for record in records:
        step, value = record["step"], number(record.get(key))
        if isinstance(step, int) and value is not None:
            steps.append(step)
            values.append(scale * value if math.isfinite(value) else math.nan)
    return steps, values


def _steps_per_epoch(records: list[Record]) -> float | None:
    for record in reversed(records):
        step, epoch = number(record["step"]), number(record.get("epoch"))
        if step and epoch and math.isfinite(epoch):
            return step / epoch
    return None


def _line(axes: Axes, points: Points, label: str, colour: str, *, marked: bool = False) -> None:
    steps, values = points
    if steps:
        # A single value makes no line, so it needs a marker to be seen.
        marker = "o" if marked or sum(map(math.isfinite, values)) < 2 else ""
        axes.plot(
            steps, values, color=colour, label=label, linewidth=1.8, marker=marker, markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.6, zorder=3 if marked else 2,
        )  # fmt: skip


def _test_point(axes: Axes, records: list[Record]) -> None:
    steps, values = _points(records, "test/accuracy", 100)
    if not steps or not math.isfinite(values[-1]):
        return
    label = f"test: {values[-1]:.2f} %"
    _, augmented = _points(records, "test/accuracy_tta", 100)
    if augmented and math.isfinite(augmented[-1]):
        label += f"\n(with further views {augmented[-1]:.2f} %)"
    axes.plot(
        steps[-1:], values[-1:], linestyle="", marker="D", markersize=7, color=TEST, label=label,
        markeredgecolor="white", markeredgewidth=0.8, zorder=4, clip_on=False,
    )  # fmt: skip


def _furnish(axes: Axes, name: str, steps_per_epoch: float | None) -> None:
    import numpy as np

    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(name, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=9)
    if not axes.lines:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=INK)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    if axes.get_legend_handles_labels()[1] and name != "learning rate":
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if steps_per_epoch is not None:
        k = steps_per_epoch
        top = axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, k), lambda x: np.multiply(x, k)))
        top.set_xlabel("epoch", color=INK)
        top.spines["top"].set_visible(False)
        top.tick_params(colors=INK, labelsize=9)
