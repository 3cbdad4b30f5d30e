"""Confidence intervals of accuracies."""

import math

_Z = 1.959963984540054  # of a normal distribution, 95 % lies within so many standard deviations


def wilson(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of Wilson for a fraction of `n` images. The ends are fractions, too."""
    centre = fraction + _Z**2 / (2 * n)
    half = _Z * math.sqrt(fraction * (1 - fraction) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return (centre - half) / scale, (centre + half) / scale
