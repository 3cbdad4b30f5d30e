"""The curves of several runs over each other, for `python -m cifar_dist.compare --plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.reports.run_state import real
from cifar_dist.tracking.curves import INK, picture
from cifar_dist.tracking.metrics_file import Record, read_records, steps_per_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinguishable for the colour-blind; from the eighth run on with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_TRAINING, _SCORED = {"alpha": 0.5, "linewidth": 1.2}, {"marker": "o"}
_PANELS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "loss (cross-entropy)": {"train/loss": _TRAINING, "val/loss": _SCORED},
    "accuracy (%)": {"train/accuracy": _TRAINING, "val/accuracy": _SCORED, "test/accuracy": {"marker": "D"}},
    "learning rate": {"lr": {}, "lr/muon": {"linewidth": 0.9}},
}


def draw(runs: Mapping[str, Path], out: Path) -> None:
    """Draw loss, accuracy and learning rate of runs, by their names.

    The horizontal axis has steps, or epochs if an epoch of one run has other steps than one of another. Runs without
    metrics are in the legend only; values that are not finite break a line.

    Args:
        out: the PNG; replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.lines import Line2D

    metrics = {name: _read(directory) for name, directory in runs.items()}
    lengths = {name: length for name, records in metrics.items() if (length := steps_per_epoch(records))}
    by_epoch = len({round(length, 3) for length in lengths.values()}) > 1
    with picture(out, 5, parse_math=False) as figure:
        handles = []
        panels = figure.subplots(1, len(_PANELS))
        for k, (name, records) in enumerate(metrics.items()):
            dashes = _DASHES[k // len(COLOURS) % len(_DASHES)]
            look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": dashes}
            handles.append(Line2D([], [], label=name.replace("_", " _", 1) if name[0] == "_" else name, **look))
            for axes, series in zip(panels, _PANELS.values(), strict=True):
                for key, style in series.items():
                    _line(axes, records, key, lengths.get(name, 1.0) if by_epoch else 1.0, {**look, **style})
        for axes, title in zip(panels, _PANELS, strict=True):
            axes.set(xlabel="epoch" if by_epoch else "step", ylabel=title)
            axes.set_xlim(left=0)
        panels[-1].set_ylim(bottom=0)
        kinds: dict[str, Mapping[str, Any]] = {
            "training": _TRAINING,
            "validation": _SCORED,
            "test": {"marker": "D", "linestyle": ""},
        }
        if any("lr/muon" in record for records in metrics.values() for record in records):
            kinds["learning rate of Muon"] = _PANELS["learning rate"]["lr/muon"]
        handles += [Line2D([], [], color=INK, label=kind, **style) for kind, style in kinds.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))


def _read(directory: Path) -> list[Record]:
    try:
        return read_records(directory / "metrics.jsonl")
    except OSError:
        return []


def _line(axes: Axes, records: list[Record], key: str, steps_per_unit: float, style: Mapping[str, Any]) -> None:
    found = [(record["step"] / steps_per_unit, real(record.get(key))) for record in records]
    points = [(x, y * (100 if "accuracy" in key else 1)) for x, y in found if y is not None]
    if points:
        marker = {"marker": "o"} if sum(math.isfinite(y) for _, y in points) < 2 else {}  # one value makes no line
        axes.plot(*zip(*points, strict=True), **{**marker, **style})
