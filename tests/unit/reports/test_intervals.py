"""Intervals of accuracies, against scipy's."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from cifar_dist.reports.intervals import wilson


@pytest.mark.parametrize(("correct", "n"), [(8840, 10_000), (0, 10), (10, 10), (1, 1), (1268, 10_000), (499, 500)])
def test_wilson(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson(correct / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("accuracy", "n"), [(1.1, 10), (-0.1, 10), (0.5, 0), (float("nan"), 10)])
def test_wilson_of_impossible_values(accuracy: float, n: int) -> None:
    with pytest.raises(ValueError, match="is impossible"):
        wilson(accuracy, n)
