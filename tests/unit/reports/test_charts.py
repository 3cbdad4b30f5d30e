"""Charts: ticks, thinning, breaks at values that are not finite, and the values for the readout."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest

from cifar_dist.reports.charts import Chart, Series, axis, draw, number, thinned

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([1.12, 1.78], [1, 1.2, 1.4, 1.6, 1.8]),
        ([-30, 85], [-50, 0, 50, 100]),
        ([0.0001, 0.00039], [0.0001, 0.0002, 0.0003, 0.0004]),
        ([5, 5], [2, 4, 6, 8]),
        ([0, 0], [-1, -0.5, 0, 0.5, 1]),
        ([], [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_ticks(values: list[float], ticks: list[float]) -> None:
    found = axis(values, 4)
    assert list(found.ticks) == pytest.approx(ticks)
    assert found.low <= min(values, default=0) <= max(values, default=1) <= found.high


def test_ticks_of_steps_are_whole() -> None:
    assert list(axis([0, 3], 5, whole=True).ticks) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.1234567, "0.12346"), (1234.5, "1,234.5"), (123_456.0, "123,460"),
     (2e7, "2e+07"), (3e-5, "3e-05"), (NAN, "nan"), (-INF, "-inf")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_thinning_keeps_spikes_ends_and_what_is_not_finite() -> None:
    points = [(float(k), math.sin(k / 5000)) for k in range(100_000)]
    points[54_321], points[77_777], points[12_345] = (54_321.0, 99.0), (77_777.0, -99.0), (12_345.0, NAN)
    found = thinned(points, 500)
    assert len(found) <= 500
    assert {points[0], points[-1], points[54_321], points[77_777]} <= {*found}
    assert [x for x, y in found if math.isnan(y)] == [12_345.0]
    assert found == sorted(found, key=lambda point: point[0])
    assert thinned(points[:300], 500) == points[:300]


def test_thinning_of_nothing_but_nan() -> None:
    assert 0 < len(thinned([(float(k), NAN) for k in range(2000)], 100)) <= 100


def test_a_value_that_is_not_finite_breaks_the_line_and_is_marked() -> None:
    text = draw(Chart("Loss", "nats", [Series("training", [(1, 2.0), (2, 1.5), (3, NAN), (4, 1.25), (5, INF)])]))
    line = re.search(r'<path d="([^"]*)" class="curve', text)
    assert line
    assert [len(part.split("L")) for part in line[1].split("M")[1:]] == [2, 1]
    assert text.count('class="cross') == 2
    assert "the first is nan at step 3." in text


@pytest.mark.parametrize("value", [sys.float_info.max, -1e308, 5e-324, -sys.float_info.max])
def test_extreme_values_cost_no_chart(value: float) -> None:
    points = [(1.0, 2.0), (2.0, value), (3.0, NAN), (4.0, 1.0), (5.0, INF)]
    assert 'class="curve' in draw(Chart("Loss", "nats", [Series("training", points)]))


def test_steps_are_read_with_all_digits() -> None:
    points = [(1_764_500_000.25, 1.0), (1_764_500_001.5, 2.0)]
    assert '"x":[1764500000.25,1764500001.5]' in draw(Chart("Loss", "nats", [Series("training", points)]))


def test_values_for_the_readout() -> None:
    text = draw(Chart("Loss", "nats", [Series("a", [(20, 1.5), (40, NAN)]), Series("b", [])], per_epoch=10))
    values = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert values["series"] == [{"label": "a", "colour": "c0", "x": [20, 40], "y": [1.5, "nan"]}]
    assert (values["ends"], values["perEpoch"], values["x"]) == ([0, 40], 10, "step")
    assert 'role="img" aria-label="Loss: nats over optimizer step; a from 1.5 to 1.5, b: no values"' in text


def test_names_cannot_end_the_script_or_begin_an_element() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    text = draw(Chart(evil, evil, [Series(evil, [(0, 1), (1, 2)])], x_name=evil))
    assert "<img" not in text
    assert text.count("</script>") == 1
    values = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert values["series"][0]["label"] == evil


def test_a_band_lies_between_its_limits() -> None:
    chart = Chart("a", "b", [Series("mean", [(0, 1), (10, 2)], limits=[(0, 0, 2), (10, 1, 3)])])
    band = re.search(r'<path d="([^"]*)" class="band', draw(chart))
    assert band
    # The y-axis goes from 0 to 3, so 2 is at a third of its height from above; forth along the highest, back.
    assert band[1] == "M0.0 333.3L1000.0 0.0L1000.0 666.7L0.0 1000.0Z"


def test_one_value_is_a_marker() -> None:
    assert "<circle" in draw(Chart("a", "b", [Series("one", [(5, 1.0)])]))
    assert draw(Chart("a", "b", [Series("two", [(5, 1.0), (6, 1.0)])])).count("<circle") == 0
