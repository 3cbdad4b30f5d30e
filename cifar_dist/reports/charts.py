"""Line charts as SVG whose lines stretch with the page while text and markers keep their size.

The values are also in the page as JSON, for the readout of report.js.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cifar_dist.reports.markup import Html, element, joined

COLOURS = 6  # of report.css; further series repeat them with dashes
LARGEST = 1e300
MAX_POINTS = 500  # of a series
STEPS = ("optimizer step", "W&B step")  # names of x-axes that begin at 0
CROSS = "\N{MULTIPLICATION SIGN}"
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points in rising order of x. y may be NaN or infinite."""

    label: str
    points: Sequence[Point]
    kind: str = "line"
    """line; dots: markers joined by a line; points: markers alone; reference: a thin line without readout."""
    limits: Sequence[tuple[float, float, float]] = ()
    """x, lowest and highest y: a band below a line, an error bar at each of the points."""
    colour: int | None = None
    """Of COLOURS; None: that of the position in the chart."""


class Axis(NamedTuple):
    low: float
    high: float
    ticks: Sequence[float]

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    title: str
    y_name: str
    """With its unit."""
    series: Sequence[Series]
    x_name: str = "optimizer step"
    from_zero: bool = False
    """Whether the y-axis includes 0."""
    ranges: tuple[Point, Point] | None = None
    """Ends of the x-axis and of the y-axis, in place of those of the values."""
    per_epoch: float | None = None
    """Steps per epoch, for the readout."""


def axis(values: Iterable[float], count: int, whole: bool = False) -> Axis:
    """An axis with about `count` round ticks that holds all `values`, which are finite; `whole`: ticks are integers."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):
        margin = abs(high) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` of the points: of each stretch the lowest, the highest and one that is not finite."""
    if len(points) <= limit:
        return list(points)
    kept = {0, len(points) - 1}
    width = len(points) / max(1, limit // 2 - 1)
    for start in range(max(1, limit // 2 - 1)):
        part = range(round(start * width), min(round((start + 1) * width), len(points)))
        finite = [k for k in part if math.isfinite(points[k][1])]
        if finite:
            kept |= {min(finite, key=lambda k: points[k][1]), max(finite, key=lambda k: points[k][1])}
        if len(finite) < len(part):
            kept.add(next(k for k in part if not math.isfinite(points[k][1])))
    return [points[k] for k in sorted(kept)]


def draw(chart: Chart, max_points: int = MAX_POINTS) -> Html:
    """The chart with its legend, and its values for the readout; series are thinned to `max_points`."""
    series = [_thin(one, max_points) for one in chart.series]
    x, y = _axes(chart, series)
    drawn = joined(part for k, one in enumerate(series) for part in _series(one, k, x, y))
    grid = joined(_rule("grid", y=1 - y.share(tick)) for tick in y.ticks)
    label = f"{chart.title}: {chart.y_name} over {chart.x_name}; {', '.join(map(_told, series))}"
    plot = element("svg", grid, drawn, role="img", aria_label=label)
    frame = (
        element("div", chart.y_name, class_="y-name"),
        element("svg", *(_label(tick, y, False) for tick in y.ticks), class_="y-ticks", aria_hidden="true"),
        element("div", plot, class_="plot", data_label=f"{chart.title}, {chart.x_name}"),
        element("svg", *(_label(tick, x, True) for tick in x.ticks), class_="x-ticks", aria_hidden="true"),
        element("div", chart.x_name, class_="x-name"),
    )
    legend = element("ul", *(_legend(one, k) for k, one in enumerate(series)), class_="legend")
    return element(
        "figure",
        element("figcaption", chart.title),
        *([legend] if [one.label for one in series] != [chart.title] else []),
        element("div", *frame, class_="frame"),
        element("p", class_="readout", aria_hidden="true"),
        _not_finite(series, chart.x_name.removeprefix("optimizer ")),
        _values(chart, series, x),
        class_="chart",
    )


def _axes(chart: Chart, series: Sequence[Series]) -> tuple[Axis, Axis]:
    if chart.ranges:
        return axis(chart.ranges[0], 5), axis(chart.ranges[1], 5)
    points = [point for one in series for point in one.points]
    are_steps = chart.x_name in STEPS
    steps = [*(step for step, _ in points), *([0.0] if are_steps or not points else [])]
    low, high = min(steps), max(steps)
    high = high if high > low else low + 1
    x = Axis(low, high, [tick for tick in axis([low, high], 5, whole=are_steps).ticks if low <= tick <= high])
    values = [value for _, value in points if math.isfinite(value)]
    ends = [value for one in series for _, *limits in one.limits for value in limits]
    return x, axis([*values, *ends, *([0.0] if chart.from_zero else [])], 4)


def _thin(series: Series, max_points: int) -> Series:
    # Axes beyond LARGEST would overflow, so such values are drawn as infinite ones.
    points = [(x, y if not abs(y) > LARGEST else math.copysign(math.inf, y)) for x, y in series.points]
    points = thinned(points, max_points)
    limits = [each for each in series.limits if max(map(abs, each[1:])) <= LARGEST]
    every = max(1, math.ceil(len(limits) / max_points))
    limits = [*limits[:-1:every], *limits[-1:]]
    return Series(series.label, points, series.kind, limits, series.colour)


def _classes(series: Series, position: int) -> str:
    colour = position if series.colour is None else series.colour
    return f"c{colour % COLOURS} dash{position // COLOURS % 3 if series.colour is None else 0} {series.kind}"


def _series(series: Series, position: int, x: Axis, y: Axis) -> Iterator[Html]:
    """Band or error bars, line, markers, and a cross at the upper edge where a value is not finite."""
    classes = _classes(series, position)
    if len(series.limits) > 1 and series.kind != "points":
        upper = [(step, high) for step, _, high in series.limits]
        lower = [(step, low) for step, low, _ in reversed(series.limits)]
        yield _stretched(element("path", d=_path([*upper, *lower], x, y) + "Z", class_=f"band {classes}"))
    elif series.limits:
        for step, low, high in series.limits:
            place = f"{x.share(step):.2%}"
            ends = {"y1": f"{1 - y.share(low):.2%}", "y2": f"{1 - y.share(high):.2%}"}
            yield element("line", x1=place, x2=place, **ends, class_=f"limits {classes}")
    finite = [point for point in series.points if math.isfinite(point[1])]
    if series.kind != "points":
        yield _stretched(element("path", d=_path(series.points, x, y), class_=f"curve {classes}"))
    if series.kind in ("dots", "points") or (len(finite) == 1 and series.kind == "line"):
        for step, value in finite:
            yield element("circle", cx=f"{x.share(step):.2%}", cy=f"{1 - y.share(value):.2%}", r=3.5, class_=classes)
    for step, value in series.points:
        if not math.isfinite(value):
            yield element("text", CROSS, x=f"{x.share(step):.2%}", y="0.6em", class_=f"cross {classes}")


def _stretched(path: Html) -> Html:
    return element("svg", path, viewBox="0 0 1000 1000", preserveAspectRatio="none", class_="stretched")


def _path(points: Iterable[Point], x: Axis, y: Axis) -> str:
    """The commands of a path in a square of 1000; a value that is not finite breaks the line."""
    words, command = list[str](), "M"
    for step, value in points:
        if math.isfinite(value):
            words.append(f"{command}{1000 * x.share(step):.1f} {1000 * (1 - y.share(value)):.1f}")
            command = "L"
        elif words:
            words.append("h0")  # makes a dot of a value between two that are not finite
            command = "M"
    return "".join(words)


def _rule(class_: str, y: float) -> Html:
    return element("line", x1="0", x2="100%", y1=f"{y:.2%}", y2=f"{y:.2%}", class_=class_)


def _label(tick: float, along: Axis, horizontal: bool) -> Html:
    share, text = along.share(tick), number(tick)
    if horizontal:
        anchor = "end" if share > 0.95 else "start" if share < 0.05 else "middle"
        return element("text", text, x=f"{share:.2%}", y="1.1em", text_anchor=anchor)
    return element("text", text, x="100%", y=f"{1 - share:.2%}", dx="-0.5em", dy="0.32em", text_anchor="end")


def number(value: float) -> str:
    """A number for people: at most five significant digits, thousands separated by commas."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    rounded = float(f"{value:.5g}") + 0.0  # -0.0 becomes 0.0
    return f"{rounded:,}".removesuffix(".0")


def _legend(series: Series, position: int) -> Html:
    classes = _classes(series, position)
    line = element("line", x1=1, x2=21, y1=6, y2=6, class_=f"curve {classes}")
    marker = element("circle", cx=11, cy=6, r=3.5, class_=classes)
    parts = {"line": (line,), "reference": (line,), "dots": (line, marker), "points": (marker,)}[series.kind]
    band = element("rect", x=1, y=1, width=20, height=10, class_=f"band {classes}")
    if series.kind == "points":
        band = element("line", x1=11, x2=11, y1=0, y2=12, class_=f"limits {classes}")
    swatch = element("svg", *((band,) if series.limits else ()), *parts, class_="swatch", aria_hidden="true")
    return element("li", swatch, element("span", series.label))


def _told(series: Series) -> str:
    finite = [value for _, value in series.points if math.isfinite(value)]
    if not finite:
        return f"{series.label}: no values"
    return f"{series.label} from {number(finite[0])} to {number(finite[-1])}"


def _not_finite(series: Sequence[Series], x_name: str) -> Html:
    places = [point for one in series for point in one.points if not math.isfinite(point[1])]
    if not places:
        return Html()
    step, value = min(places, key=lambda point: point[0])
    text = f"{CROSS} marks values that are not finite; the first is {value} at {x_name} {step:,.12g}."
    return element("p", text, class_="note")


def _values(chart: Chart, series: Sequence[Series], x: Axis) -> Html:
    shown = [(k, one) for k, one in enumerate(series) if one.kind != "reference" and one.points]
    values = {
        "x": chart.x_name.removeprefix("optimizer "),
        "ends": [x.low, x.high],
        "perEpoch": chart.per_epoch,
        "series": [
            {
                "label": one.label,
                "colour": _classes(one, k).split()[0],
                "x": [_short(step, 15) for step, _ in one.points],
                "y": [_short(value) for _, value in one.points],
            }
            for k, one in shown
        ],
    }
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    # `</script>` and `<!--` must not appear inside a script element.
    return Html(f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script>')


def _short(value: float, digits: int = 5) -> float | int | str:
    """The value in few characters; what JSON has no number for as text."""
    if not math.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{digits}g}")
