"""Machine code for one CPU thread: batch norm with ReLU, and pools of 3x3, forward and backward; by numba.

Tensors (N, H, W, C) come as arrays of the bits of their numbers: int16 for bfloat16, int32 for float32. All is computed
in float32, long sums in float64. Inner loops are over adjacent numbers, so that LLVM makes vector instructions of them.
It reorders no sum for that, so results do not depend on the processor.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from cifar_dist import machine_code
from cifar_dist.machine_code import to_bits, to_float

_function: Callable[[Any], Any] = numba.njit(error_model="numpy", nogil=True)
_LENGTH = 768  # of inner loops of `norm_forward` and `norm_backward`, about
_ROWS = 64  # how many numbers are added in float32, before the sum goes to one in float64


@cache
def compiled(function: Any, itemsize: int) -> Any:
    """One of the public functions below for numbers of `itemsize` bytes."""
    images = numba.types.Array({2: numba.int16, 4: numba.int32}[itemsize], 4, "C")
    channels, statistics = numba.float32[::1], numba.float32[:, ::1]
    types = {
        norm_forward: (images, channels, channels, numba.float64, images, statistics),
        norm_backward: (images, images, statistics, images, channels, channels),
        pool_forward: (images, images),
        pool_backward: (images, images, images, images),
        mean_pool: (images, images),
    }
    return machine_code.compiled(function, numba.void(*types[function]))


def norm_forward(x: Any, scale: Any, bias: Any, eps: float, y: Any, statistics: Any) -> None:
    """Write max(0, batch norm of x) into y.

    statistics: (4, C); gets mean, 1 / standard deviation, and the factor and the term that together are the norm.
    """
    mean, inverse, factor, term = statistics
    count, channels = x.size // len(scale), len(scale)
    length = _pixels(x) * channels
    flat, offset = x.reshape(-1), np.zeros(channels, np.float32)
    sums, squares = np.zeros(length, np.float64), np.zeros(length, np.float64)
    _add_moments(sums, squares, x[0].reshape(-1), _repeated(offset, length))
    for c in range(channels):
        offset[c] = _sum(sums, c, channels) / x[0].size * channels  # differences from about the mean round less
    sums[:], squares[:] = 0, 0
    _add_moments(sums, squares, flat, _repeated(offset, length))
    for c in range(channels):
        difference = _sum(sums, c, channels) / count
        variance = max(_sum(squares, c, channels) / count - difference * difference, 0.0)
        mean[c], inverse[c] = offset[c] + difference, 1 / np.sqrt(variance + eps)
        factor[c] = scale[c] * inverse[c]
        term[c] = bias[c] - mean[c] * factor[c]
    _scale_relu(y.reshape(-1), flat, _repeated(factor, length), _repeated(term, length))


def norm_backward(x: Any, gradient: Any, statistics: Any, of_x: Any, of_scale: Any, of_bias: Any) -> None:
    """Write the gradients of x, scale and bias into the last three arguments, given that of y."""
    mean, inverse, factor, term = statistics
    count, channels = x.size // len(mean), len(mean)
    length = _pixels(x) * channels
    inputs, gradients = x.reshape(-1), gradient.reshape(-1)
    factors, terms = _repeated(factor, length), _repeated(term, length)
    sums, products = np.zeros(length, np.float64), np.zeros(length, np.float64)
    _add_products(sums, products, inputs, gradients, factors, terms, _repeated(mean, length))
    slope, constant = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for c in range(channels):
        total, product = _sum(sums, c, channels), _sum(products, c, channels)
        of_bias[c], of_scale[c] = total, product * inverse[c]
        exact = -factor[c] * inverse[c] * inverse[c] * product / count
        slope[c], constant[c] = exact, -factor[c] * total / count - exact * mean[c]
    slopes, constants = _repeated(slope, length), _repeated(constant, length)
    _combine(of_x.reshape(-1), inputs, gradients, factors, terms, slopes, constants)


def pool_forward(x: Any, y: Any) -> None:
    """Write the maxima of x into y, stride 1."""
    n, h, w, c = x.shape
    pitch = (w + 2) * c  # with margins, so that the neighbours of a number are at fixed distances
    start, size, room = pitch + c, h * pitch, (h + 3) * pitch
    image, rows, maxima = _lowest(room), _lowest(room), np.empty(size, np.float32)
    for k in range(n):
        _load_rows(image[start:], x[k].reshape(-1), h, w * c, pitch)
        _maximum(rows[start : start + size], image[start - c :], image[start:], image[start + c :])
        _maximum(maxima, rows[start - pitch :], rows[start:], rows[start + pitch :])
        _store_rows(y[k].reshape(-1), maxima, h, w * c, pitch)


def pool_backward(x: Any, y: Any, gradient: Any, of_x: Any) -> None:
    """Write the gradient of x, given that of y, into `of_x`: first that of the maxima of rows, then of the image."""
    n, h, w, c = x.shape
    pitch = (w + 2) * c
    start, size, room = 2 * pitch + 2 * c, h * pitch, (h + 4) * pitch
    image, rows, maxima = _lowest(room), _lowest(room), _lowest(room)
    gradients, of_rows, result = np.zeros(room, np.float32), np.zeros(room, np.float32), np.empty(size, np.float32)
    for k in range(n):
        _load_rows(image[start:], x[k].reshape(-1), h, w * c, pitch)
        _load_rows(maxima[start:], y[k].reshape(-1), h, w * c, pitch)
        _load_rows(gradients[start:], gradient[k].reshape(-1), h, w * c, pitch)
        _maximum(rows[start : start + size], image[start - c :], image[start:], image[start + c :])
        _to_first_maximum(of_rows[start : start + size], gradients, rows, maxima, start, pitch)
        _to_first_maximum(result, of_rows, image, rows, start, c)
        _store_rows(of_x[k].reshape(-1), result, h, w * c, pitch)


def mean_pool(x: Any, y: Any) -> None:
    """Write the means of 3x3 pixels of x into y, stride 1; outside are zeros. Also the backward pass, of gradients."""
    n, h, w, c = x.shape
    pitch = (w + 2) * c
    start, size, room = pitch + c, h * pitch, (h + 3) * pitch
    image, rows, means = np.zeros(room, np.float32), np.zeros(room, np.float32), np.empty(size, np.float32)
    for k in range(n):
        _load_rows(image[start:], x[k].reshape(-1), h, w * c, pitch)
        _scaled_sum(rows[start : start + size], image[start - c :], image[start:], image[start + c :], np.float32(1))
        _scaled_sum(means, rows[start - pitch :], rows[start:], rows[start + pitch :], np.float32(1 / 9))
        _store_rows(y[k].reshape(-1), means, h, w * c, pitch)


@_function
def _load(to: Any, source: Any) -> None:
    for t in range(to.size):
        to[t] = to_float(source[t])


@_function
def _load_rows(to: Any, source: Any, num: int, length: int, pitch: int) -> None:
    for i in range(num):
        _load(to[i * pitch : i * pitch + length], source[i * length :])


@_function
def _store_rows(to: Any, source: Any, num: int, length: int, pitch: int) -> None:
    for i in range(num):
        row, other = to[i * length : (i + 1) * length], source[i * pitch :]
        for t in range(row.size):
            row[t] = to_bits(other[t], to)


@_function
def _lowest(size: int) -> Any:
    return np.full(size, -np.inf, np.float32)


@_function
def _maximum(to: Any, a: Any, b: Any, c: Any) -> None:
    """Of each three numbers; NaN if one is."""
    for t in range(to.size):
        larger = b[t] if (b[t] > a[t]) | (b[t] != b[t]) else a[t]
        to[t] = c[t] if (c[t] > larger) | (c[t] != c[t]) else larger


@_function
def _to_first_maximum(to: Any, gradients: Any, values: Any, maxima: Any, start: int, distance: int) -> None:
    """For windows of three values at `distance`: the gradients of their maxima go to the first of equal values."""
    after, here, before = gradients[start + distance :], gradients[start:], gradients[start - distance :]
    value, left, leftmost = values[start:], values[start - distance :], values[start - 2 * distance :]
    maximum_after, maximum, maximum_before = maxima[start + distance :], maxima[start:], maxima[start - distance :]
    none = np.float32(0)
    for t in range(to.size):
        as_first = after[t] if value[t] == maximum_after[t] else none
        as_middle = here[t] if (value[t] == maximum[t]) & (left[t] != maximum[t]) else none
        as_last = before[t] if (left[t] != maximum_before[t]) & (leftmost[t] != maximum_before[t]) else none
        to[t] = (as_first + as_middle) + as_last


@_function
def _scaled_sum(to: Any, a: Any, b: Any, c: Any, factor: Any) -> None:
    for t in range(to.size):
        to[t] = ((a[t] + b[t]) + c[t]) * factor


@_function
def _pixels(x: Any) -> Any:
    """Number of adjacent pixels that an inner loop handles: a divisor of the width of an image."""
    pixels = max(1, min(x.shape[2], _LENGTH // x.shape[3]))
    while x.shape[2] % pixels:
        pixels -= 1
    return pixels


@_function
def _repeated(values: Any, length: int) -> Any:
    result = np.empty(length, np.float32)
    for t in range(length):
        result[t] = values[t % values.size]
    return result


@_function
def _sum(values: Any, channel: int, channels: int) -> float:
    total = 0.0
    for t in range(channel, values.size, channels):
        total += values[t]
    return total


@_function
def _add_moments(sums: Any, squares: Any, x: Any, offset: Any) -> None:
    length = sums.size
    for block in range(0, x.size, _ROWS * length):
        some, some_squares = np.zeros(length, np.float32), np.zeros(length, np.float32)
        for start in range(block, min(block + _ROWS * length, x.size), length):
            row = x[start : start + length]
            for t in range(length):
                difference = to_float(row[t]) - offset[t]
                some[t] += difference
                some_squares[t] += difference * difference
        sums += some
        squares += some_squares


@_function
def _scale_relu(y: Any, x: Any, factor: Any, term: Any) -> None:
    length = factor.size
    for start in range(0, x.size, length):
        row, to = x[start : start + length], y[start : start + length]
        for t in range(length):
            value = to_float(row[t]) * factor[t] + term[t]
            to[t] = to_bits(np.float32(0) if value <= 0 else value, y)  # NaN stays NaN


@_function
def _add_products(sums: Any, products: Any, x: Any, gradient: Any, factor: Any, term: Any, mean: Any) -> None:
    length = sums.size
    for block in range(0, x.size, _ROWS * length):
        some, some_products = np.zeros(length, np.float32), np.zeros(length, np.float32)
        for start in range(block, min(block + _ROWS * length, x.size), length):
            inputs, gradients = x[start : start + length], gradient[start : start + length]
            for t in range(length):
                value = to_float(inputs[t])
                passed = to_float(gradients[t]) if value * factor[t] + term[t] > 0 else np.float32(0)
                some[t] += passed
                some_products[t] += passed * (value - mean[t])
        sums += some
        products += some_products


@_function
def _combine(of_x: Any, x: Any, gradient: Any, factor: Any, term: Any, slope: Any, constant: Any) -> None:
    length = term.size
    for start in range(0, x.size, length):
        inputs, gradients = x[start : start + length], gradient[start : start + length]
        to = of_x[start : start + length]
        for t in range(length):
            value = to_float(inputs[t])
            passed = to_float(gradients[t]) if value * factor[t] + term[t] > 0 else np.float32(0)
            to[t] = to_bits(passed * factor[t] + (value * slope[t] + constant[t]), x)
