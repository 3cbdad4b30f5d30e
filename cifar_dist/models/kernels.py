"""Machine code for one CPU thread: batch norm with ReLU, and max-pool of 3x3, forward and backward; by numba.

Tensors (N, H, W, C) come as arrays of the bits of their numbers: int16 for bfloat16, int32 for float32. All is
computed in float32. Inner loops are over adjacent numbers, so that LLVM makes vector instructions of them. It reorders
no sum for that, so results do not depend on the processor.
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


@cache
def compiled(function: Any, itemsize: int) -> Any:
    """One of the four functions below for numbers of `itemsize` bytes."""
    images = numba.types.Array({2: numba.int16, 4: numba.int32}[itemsize], 4, "C")
    channels = numba.float32[::1]
    types = {
        norm_forward: (images, images, channels, channels, numba.float64, channels, channels),
        norm_backward: (*[images] * 3, *[channels] * 3, images, channels, channels),
        pool_forward: (images, images),
        pool_backward: (images, images, images, images),
    }
    return machine_code.compiled(function, numba.void(*types[function]))


def norm_forward(x: Any, y: Any, scale: Any, bias: Any, eps: float, mean: Any, inverse: Any) -> None:
    """Write max(0, batch norm of x) into y, and per channel the mean and 1 / standard deviation."""
    count, channels = x.size // len(scale), len(scale)
    pixels = _pixels(x)
    length = pixels * channels
    flat, offset = x.reshape(-1), np.empty(length, np.float32)
    _load(offset[:channels], flat[:channels])  # sums of differences from any value of the channel round less
    for t in range(channels, length):
        offset[t] = offset[t - channels]
    sums, squares = np.zeros(length, np.float32), np.zeros(length, np.float32)
    _add_moments(sums, squares, flat, offset)
    factor, term = np.empty(length, np.float32), np.empty(length, np.float32)
    for c in range(channels):
        difference = _sum(sums, c, channels) / count
        variance = max(_sum(squares, c, channels) / count - difference * difference, 0.0)
        mean[c], inverse[c] = offset[c] + difference, 1 / np.sqrt(variance + eps)
        factor[c::channels] = scale[c] * inverse[c]
        term[c::channels] = bias[c] - mean[c] * factor[c]
    _scale_relu(y.reshape(-1), flat, factor, term)


def norm_backward(
    x: Any, y: Any, gradient: Any, scale: Any, mean: Any, inverse: Any, of_x: Any, of_scale: Any, of_bias: Any
) -> None:
    """Write the gradients of x, scale and bias, given that of y, into the last three arguments."""
    count, channels = x.size // len(scale), len(scale)
    length = _pixels(x) * channels
    inputs, outputs, gradients, result = x.reshape(-1), y.reshape(-1), gradient.reshape(-1), of_x.reshape(-1)
    means = np.empty(length, np.float32)
    for t in range(length):
        means[t] = mean[t % channels]
    sums, products = np.zeros(length, np.float32), np.zeros(length, np.float32)
    _add_products(sums, products, inputs, outputs, gradients, means)
    of_gradient, of_input, term = (
        np.empty(length, np.float32),
        np.empty(length, np.float32),
        np.empty(length, np.float32),
    )
    for c in range(channels):
        total, product = _sum(sums, c, channels), _sum(products, c, channels)
        of_bias[c], of_scale[c] = total, product * inverse[c]
        factor = np.float64(scale[c]) * inverse[c]
        slope = -factor * inverse[c] * inverse[c] * product / count
        of_gradient[c::channels], of_input[c::channels] = factor, slope
        term[c::channels] = -factor * total / count - slope * mean[c]
    _combine(result, inputs, outputs, gradients, of_gradient, of_input, term)


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
def _pixels(x: Any) -> Any:
    """Number of adjacent pixels that an inner loop handles: a divisor of the width of an image."""
    pixels = max(1, min(x.shape[2], _LENGTH // x.shape[3]))
    while x.shape[2] % pixels:
        pixels -= 1
    return pixels


@_function
def _sum(values: Any, channel: int, channels: int) -> float:
    total = 0.0
    for t in range(channel, values.size, channels):
        total += values[t]
    return total


@_function
def _add_moments(sums: Any, squares: Any, x: Any, offset: Any) -> None:
    length = sums.size
    for start in range(0, x.size, length):
        row = x[start : start + length]
        for t in range(length):
            difference = to_float(row[t]) - offset[t]
            sums[t] += difference
            squares[t] += difference * difference


@_function
def _scale_relu(y: Any, x: Any, factor: Any, term: Any) -> None:
    length = factor.size
    for start in range(0, x.size, length):
        row, to = x[start : start + length], y[start : start + length]
        for t in range(length):
            value = to_float(row[t]) * factor[t] + term[t]
            to[t] = to_bits(np.float32(0) if value <= 0 else value, y)  # NaN stays NaN


@_function
def _add_products(sums: Any, products: Any, x: Any, y: Any, gradient: Any, mean: Any) -> None:
    length = sums.size
    for start in range(0, x.size, length):
        end = start + length
        inputs, outputs, gradients = x[start:end], y[start:end], gradient[start:end]
        for t in range(length):
            passed = to_float(gradients[t]) if outputs[t] > 0 else np.float32(0)
            sums[t] += passed
            products[t] += passed * (to_float(inputs[t]) - mean[t])


@_function
def _combine(of_x: Any, x: Any, y: Any, gradient: Any, of_gradient: Any, of_input: Any, term: Any) -> None:
    length = term.size
    for start in range(0, x.size, length):
        end = start + length
        inputs, outputs, gradients, to = x[start:end], y[start:end], gradient[start:end], of_x[start:end]
        for t in range(length):
            passed = to_float(gradients[t]) if outputs[t] > 0 else np.float32(0)
            value = passed * of_gradient[t] + (to_float(inputs[t]) * of_input[t] + term[t])
            to[t] = to_bits(value, x)
