"""Which curves a report draws: those of one run by what they measure, those of several runs over each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from cifar_dist.reports.charts import MAX_POINTS, Chart, Series
from cifar_dist.reports.run_data import Curve, RunData

MAX_CHARTS = 40
MAX_RATIO = 5  # of the learning rates in one chart
MAX_LINES = 12  # of a chart; more cannot be told apart
PAGE_POINTS = 9_000  # of all curves of a page, for its size


class Quantity(NamedTuple):
    """How a curve is shown."""

    title: str
    y_name: str
    scale: float = 1
    from_zero: bool = False
    kind: str = "line"


QUANTITIES = {
    "train/loss": Quantity("Training loss", "cross-entropy (nats)"),
    "val/loss": Quantity("Validation loss", "cross-entropy (nats)", kind="dots"),
    "train/accuracy": Quantity("Training accuracy", "accuracy (%)", 100),
    "val/accuracy": Quantity("Validation accuracy", "accuracy (%)", 100, kind="dots"),
    "train/objective": Quantity("Training objective", "minimised loss (nats)"),
    "lr": Quantity("Learning rate", "learning rate", from_zero=True),
    "lr/biases": Quantity("Learning rate of the biases", "learning rate", from_zero=True),
    "lr/muon": Quantity("Learning rate of Muon", "learning rate", from_zero=True),
    "gradient_norm": Quantity("Gradient norm", "L2 norm, before clipping", from_zero=True),
    "images_per_second": Quantity("Throughput", "images per second", from_zero=True),
    "data_wait": Quantity("Data wait", "share of the training time (%)", 100, from_zero=True),
    "gpu_memory_bytes": Quantity("GPU memory", "peak (GiB)", 2.0**-30, from_zero=True),
}
TEST = {
    "test/loss": Quantity("Test loss", "cross-entropy (nats)", kind="points"),
    "test/accuracy": Quantity("Test accuracy", "accuracy (%)", 100, kind="points"),
    "test/accuracy_tta": Quantity("Test accuracy with TTA", "accuracy (%)", 100, kind="points"),
}
RATES = "Learning rate"
# The charts of one run: a title, and the label of each curve. The first curve gives the unit.
TOGETHER: Mapping[str, Mapping[str, str]] = {
    "Loss": {"train/loss": "training", "val/loss": "validation", "test/loss": "test"},
    "Accuracy": {
        "train/accuracy": "training", "val/accuracy": "validation", "test/accuracy": "test",
        "test/accuracy_tta": "test, with test-time augmentation",
    },
    "Objective": {"train/objective": "training"},
    RATES: {"lr": "filters and matrices (SGD)", "lr/biases": "biases (SGD)", "lr/muon": "filters (Muon)"},
    "Gradient norm": {"gradient_norm": "gradient of all parameters"},
    "Throughput": {"images_per_second": "all devices"},
    "Data wait": {"data_wait": "rank 0 waits for images"},
    "GPU memory": {"gpu_memory_bytes": "rank 0"},
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs drawn as one line: a single run, or the mean of runs that differ in the seed only."""

    label: str
    """Empty: the name of the curve."""
    runs: Sequence[RunData]


def charts_of_run(run: RunData) -> list[Chart]:
    """The charts of TOGETHER for which there are values, then one for each further curve."""
    titles = dict[str, Mapping[str, str]]()
    for title, labels in TOGETHER.items():
        titles |= _rates(run) if title == RATES else {title: labels}
    charts = [_together(run, title, keys) for title, keys in titles.items() if not keys.keys().isdisjoint(run.curves)]
    drawn = {key for labels in titles.values() for key in labels}
    others = [key for key in run.curves if key not in drawn]
    return charts + [_overlay(key, [Group("", [run])]) for key in others[:MAX_CHARTS]]


def _rates(run: RunData) -> dict[str, Mapping[str, str]]:
    """One chart of all learning rates, or one for each if the largest would flatten the others."""
    labels = {key: label for key, label in {**TOGETHER[RATES], **_own_rates(run)}.items() if key in run.curves}
    peaks = [max(value for _, value in run.curves[key]) for key in labels]
    if peaks and max(peaks) > MAX_RATIO * min(peaks):
        return {f"{RATES}: {label}": {key: label} for key, label in labels.items()}
    return {RATES: labels}


def _own_rates(run: RunData) -> dict[str, str]:
    """The learning rates of the further groups of an own optimizer."""
    keys = [key for key in run.curves if key.startswith("lr/") and key not in TOGETHER[RATES]]
    return {key: f"group {key.removeprefix('lr/')}" for key in keys}


def _together(run: RunData, title: str, labels: Mapping[str, str]) -> Chart:
    keys = [key for key in labels if key in run.curves]
    quantities = {key: (QUANTITIES | TEST).get(key, QUANTITIES["lr"]) for key in keys}
    colours = {key: k for k, key in enumerate(labels)}  # of a curve also where another one is missing
    series = [
        Series(_label(run, key, labels[key]), _scaled(run.curves[key], q.scale), q.kind, colour=colours[key])
        for key, q in quantities.items()
    ]
    first = quantities[keys[0]]
    return Chart(title, first.y_name, series, from_zero=first.from_zero, per_epoch=run.steps_per_epoch)


def _label(run: RunData, key: str, label: str) -> str:
    if key == "lr" and _own_rates(run):
        return "first group"
    if key == "lr" and not any(name.startswith("lr/") for name in run.curves):
        return "all parameters"
    if key == "train/objective" or (key == "train/loss" and "train/objective" not in run.curves):  # of an older run
        smoothed = run.settings.get("optim.label_smoothing", "none") not in ("0.0", "0", "none")
        parts = ["label smoothing"] * smoothed + ["auxiliary heads"] * (run.settings.get("model.auxiliary") == "true")
        return f"{label}, with {' and '.join(parts)}" if parts else label
    return label


def charts_over_each_other(groups: Sequence[Group]) -> tuple[list[Chart], int]:
    """A chart for each curve with a line per group, and the number of curves left out.

    Beyond MAX_CHARTS those are left out first that never change, then the last ones.
    """
    shown = groups[:MAX_LINES]
    keys = list(dict.fromkeys(key for group in shown for run in group.runs for key in run.curves))
    keys = [*(key for key in QUANTITIES if key in keys), *(key for key in keys if key not in QUANTITIES | TEST)]
    changing = [key for key in keys if any(_changes(run.curves.get(key, [])) for group in shown for run in group.runs)]
    constant = [key for key in keys if key not in changing]
    kept = {*(changing + constant)[:MAX_CHARTS]}
    return [_overlay(key, shown) for key in keys if key in kept], len(keys) - len(kept)


def _changes(curve: Curve) -> bool:
    return len({value for _, value in curve if math.isfinite(value)}) > 1


def _overlay(key: str, groups: Sequence[Group]) -> Chart:
    having = [run for group in groups for run in group.runs if key in run.curves]
    # Another program's accuracy may be in percent already.
    foreign = any(run.facts for run in having)
    quantity = Quantity(key, key) if foreign else QUANTITIES.get(key, Quantity(key, key))
    series = [
        _series(group, key, k, quantity)
        for k, group in enumerate(groups)
        if any(key in run.curves for run in group.runs)
    ]
    return Chart(
        quantity.title,
        quantity.y_name,
        series,
        x_name=having[0].x_names.get(key, "optimizer step"),
        from_zero=quantity.from_zero,
        per_epoch=having[0].steps_per_epoch,
    )


def _series(group: Group, key: str, colour: int, quantity: Quantity) -> Series:
    """The curve of one run; of several the mean, with a band from the lowest to the highest value."""
    curves = [_scaled(run.curves[key], quantity.scale) for run in group.runs if key in run.curves]
    label = group.label or quantity.title
    if len(curves) == 1:
        return Series(label, curves[0], quantity.kind, colour=colour)
    by_step = [dict(curve) for curve in curves]
    columns = [(step, [values[step] for values in by_step]) for step in by_step[0] if all(step in v for v in by_step)]
    finite = [(step, values) for step, values in columns if all(map(math.isfinite, values))]
    mean = [(step, fmean(values) if all(map(math.isfinite, values)) else math.nan) for step, values in columns]
    limits = [(step, min(values), max(values)) for step, values in finite]
    return Series(label, mean, quantity.kind, limits, colour)


def _scaled(curve: Curve, scale: float) -> Curve:
    return curve if scale == 1 else [(step, scale * value) for step, value in curve]


def points_per_series(charts: Sequence[Chart]) -> int:
    """So many that a page with these charts stays small."""
    lines = sum(1 + bool(series.limits) for chart in charts for series in chart.series)
    return min(MAX_POINTS, max(40, PAGE_POINTS // max(1, lines)))


def by_prefix(charts: Sequence[Chart]) -> Iterator[tuple[str, list[Chart]]]:
    """Charts by the part of their titles before the first / or ., in alphabetical order; those without one first."""
    groups: dict[str, list[Chart]] = {"": []}
    for chart in charts:
        head, separator, _ = chart.title.replace(".", "/").partition("/")
        groups.setdefault(head if separator else "", []).append(chart)
    yield from ((prefix, groups[prefix]) for prefix in sorted(groups) if groups[prefix])
