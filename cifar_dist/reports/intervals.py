"""The confidence interval of one accuracy."""

import math

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction that was measured on `n` images.

    See Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Raises:
        ValueError: `accuracy` is no fraction, or `n` no number of images.
    """
    if not (0 <= accuracy <= 1 and n >= 1):
        raise ValueError(f"an accuracy of {accuracy} on {n} images is impossible")
    centre = (accuracy + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
