"""A run's learning rate over its steps, before it is run: as a picture, and as characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.tracking.curves import GRID, INK, TEST, TRAIN, VALIDATION, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCKS = " ▁▂▃▄▅▆▇█"
_LOW_RESOLUTION = "#CC79A7"


@dataclass(frozen=True)
class Timeline:
    """`shares[k]` is the learning rate of step k + 1 as a share of its peak; `peaks` by what is stepped at it; `events`
    by name the steps at which something happens; `low_resolution_steps` come first."""

    shares: Sequence[float]
    steps_per_epoch: int
    peaks: Mapping[str, float]
    events: Mapping[str, Sequence[int]] = field(default_factory=dict)
    low_resolution_steps: int = 0


def text_curve(shares: Sequence[float], width: int = 64, height: int = 4, plain: bool = False) -> list[str]:
    """The curve in `height` lines of `width` characters, the highest first.

    Args:
        shares: from 0 to 1, one per step; each column shows the largest of its steps, or one step several columns.
        plain: ASCII only.
    """
    edges = [k * len(shares) // width for k in range(width + 1)]
    eighths = [round(8 * height * max(shares[a : max(b, a + 1)])) for a, b in pairwise(edges)]
    lines = []
    for row in reversed(range(height)):
        filled = [min(8, max(0, value - 8 * row)) for value in eighths]
        lines.append("".join("#" if plain and n >= 4 else " " if plain else _BLOCKS[n] for n in filled).rstrip())
    return lines


def draw_timeline(timeline: Timeline, out: Path, title: str) -> None:
    """Draw the learning rate over the steps, epochs along the top, and below what happens when.

    Args:
        out: the PNG, 1320 x 660 pixels; replaced as a whole.
        title: stands above.

    Raises:
        UserError: the picture cannot be written.
    """
    figure = new_figure(title, (11, 5.5), pad=0.12)
    ratios = (4, 0.35 * max(1, len(timeline.events)))
    rate, events = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    _draw_rate(rate, timeline)
    _draw_events(events, timeline.events)
    for axes in (rate, events):
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.tick_params(colors=INK, labelsize=9)
    write_png(figure, out, "picture")


def _draw_rate(axes: Axes, timeline: Timeline) -> None:
    import numpy as np

    total, k = len(timeline.shares), timeline.steps_per_epoch
    steps = list(range(1, total + 1))
    peaks = "\n".join(f"{name}: {peak:g} at 100 %" for name, peak in timeline.peaks.items())
    marker = "o" if total == 1 else ""  # a single value makes no line
    axes.plot(steps, [100 * share for share in timeline.shares], color=TRAIN, linewidth=1.8, label=peaks, marker=marker)
    if timeline.low_resolution_steps:
        label = "images reduced to 24 x 24"
        axes.axvspan(0, timeline.low_resolution_steps, color=_LOW_RESOLUTION, alpha=0.15, linewidth=0, label=label)
    axes.set_ylabel("learning rate (% of its peak)", color=INK)
    axes.set_xlim(0, total)
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    top = axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, k), lambda x: np.multiply(x, k)))
    top.set_xlabel("epoch", color=INK)
    top.spines["top"].set_visible(False)
    top.tick_params(colors=INK, labelsize=9)


def _draw_events(axes: Axes, events: Mapping[str, Sequence[int]]) -> None:
    names = list(events)
    for row, name in enumerate(names):
        colour = VALIDATION if name == "validation" else TEST
        where = [row] * len(events[name])
        # A mark at the last step would be cut in half by the frame.
        axes.plot(
            events[name], where, linestyle="", marker="|", markersize=11, color=colour, clip_on=False,
            markeredgewidth=1.6,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [f"{name} ({len(events[name])})" for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("step", color=INK)
    axes.locator_params(axis="x", integer=True)
