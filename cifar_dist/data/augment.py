"""Flip, translation, cutout and normalisation of a batch on its device, from counter-based random bits.

What happens to a sample is a function of (seed, epoch, sample index) alone: the same on CPU and GPU, on any
rank, in any batch. The mixing function is lowbias32 (Chris Wellons, "Hash prospector").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.config import AugmentConfig
from cifar_dist.data import cifar10
from cifar_dist.hashing import derive

# Pixels here are 0 to 255.
MEAN = tuple(255 * value for value in cifar10.MEAN)
STD = tuple(255 * value for value in cifar10.STD)
_MASK32 = 0xFFFFFFFF
# The multipliers less 2**32, so that the product of either with 32 bits fits into a signed 64-bit integer.
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
# Which random word of a sample decides what; those of x and y stand side by side.
_FLIP, _SHIFT, _CUT = 0, slice(1, 3), slice(3, 5)
NUM_WORDS = 5


def mix32(x: Tensor) -> Tensor:
    """Bijective mix of 32-bit numbers held in int64."""
    x = ((x ^ (x >> 16)) * _M1) & _MASK32
    x = ((x ^ (x >> 15)) * _M2) & _MASK32
    return x ^ (x >> 16)


def random_words(indices: Tensor, *keys: int) -> Tensor:
    """Random bits: indices (N,) int64 to (number of keys, N, 5) int64, each word uniform in 0 to 2**32 - 1.

    All keys go through together, as for a batch of 100 the calls cost more than the arithmetic.
    """
    lows = mix32(torch.stack([indices ^ (key & _MASK32) for key in keys]))
    base = mix32(torch.stack([low ^ (key >> 32) for low, key in zip(lows, keys, strict=True)]))
    counters = torch.arange(1, NUM_WORDS + 1, device=indices.device) * 0x3C6EF372
    return mix32((base[..., None] + counters) & _MASK32)


@dataclass(frozen=True)
class Draws:
    """What happens to each sample: `flip` (N,) bool; shifts and cutout corners (N,) int64, in pixels."""

    flip: Tensor
    shift_x: Tensor
    shift_y: Tensor
    cut_x: Tensor
    cut_y: Tensor

    def columns(self) -> Tensor:
        """(N, 5) int64, for the data receipt."""
        return torch.stack((self.flip.long(), self.shift_x, self.shift_y, self.cut_x, self.cut_y), dim=1)


def draw(indices: Tensor, seed: int, epoch: int, config: AugmentConfig, size: int = 32) -> Draws:
    """Decide what happens to the samples `indices` (N,) int64 in `epoch`."""
    keys = [derive(seed, "augment", epoch)]
    if config.flip == "alternating":
        keys.append(derive(seed, "flip"))
    words, *more = random_words(indices, *keys).unbind()
    if config.flip == "none":
        flip = torch.zeros_like(indices, dtype=torch.bool)
    elif config.flip == "random":
        flip = words[:, _FLIP] >> 31 == 1
    else:
        # One coin per sample for the whole run, turned over every epoch (Jordan, arXiv 2404.00498).
        flip = more[0][:, _FLIP] >> 31 != epoch & 1
    # The high bits of word x range: uniform to within range / 2**32.
    shift = (words[:, _SHIFT] * (2 * config.translate + 1) >> 32) - config.translate
    # The square's centre is any pixel, so that it may stick out, as in the paper.
    cut = (words[:, _CUT] * size >> 32) - config.cutout // 2
    return Draws(flip, *shift.unbind(dim=1), *cut.unbind(dim=1))


def apply(images: Tensor, draws: Draws, cutout: int, dtype: torch.dtype, side: int | None = None) -> Tensor:
    """Augment and normalise: (N, 3, H, W) uint8 to the same shape, or (N, 3, `side`, `side`), in `dtype`,
    channels-last.

    Shifts must be less than the side they move along, H or W.
    """
    n, channels, height, width = images.shape
    # Reflection makes a row periodic: forwards, backwards without the two end pixels, forwards again. Every shift
    # of the row and of its mirror image is a run of `width` pixels of that, which is copied in one piece.
    there, back = images.permute(0, 2, 3, 1), images.flip(3).permute(0, 2, 3, 1)
    wide = torch.cat((there, back[:, :, 1:-1], there), dim=2)
    runs = wide.view(-1, channels).unfold(0, width, 1).transpose(1, 2)  # overlapping views, not copies
    rows, image = (torch.arange(size, device=images.device) for size in (height, n))
    y = _reflect(rows + draws.shift_y[:, None], height)
    start = (draws.shift_x + draws.flip * (width - 1)) % (2 * width - 2)
    place = y * wide.shape[2] + (image * (height * wide.shape[2]) + start)[:, None]
    moved = runs.index_select(0, place.view(-1))
    output = _normalize_rows(moved.view(n, height, -1), dtype if side is None else _at_least_float32(dtype))
    if cutout:
        # Compiled, a mask over everything is part of the one kernel; by itself it costs as much as all of the above.
        cover = _cover_by_mask if torch.compiler.is_compiling() else _cover_by_place
        cover(output, draws, cutout, channels)
    output = output.view(n, height, width, channels).permute(0, 3, 1, 2)
    if side is None:
        return output
    return F.interpolate(output, (side, side), mode="bilinear", antialias=True).to(dtype)


def _cover_by_mask(rows: Tensor, draws: Draws, cutout: int, channels: int) -> None:
    """Zero the square of each image, in place: (N, H, W * `channels`)."""
    y = torch.arange(rows.shape[1], device=rows.device)
    x = torch.arange(rows.shape[2] // channels, device=rows.device)
    in_rows = (y >= draws.cut_y[:, None]) & (y < draws.cut_y[:, None] + cutout)
    in_columns = (x >= draws.cut_x[:, None]) & (x < draws.cut_x[:, None] + cutout)
    rows.masked_fill_(in_rows[:, :, None] & in_columns.repeat_interleave(channels, dim=1)[:, None, :], 0.0)


def _cover_by_place(rows: Tensor, draws: Draws, cutout: int, channels: int) -> None:
    """The same. What sticks out is moved to the border, which is inside the square then, as its centre is a pixel."""
    n, height, width = len(rows), rows.shape[1], rows.shape[2] // channels
    side, first = torch.arange(cutout, device=rows.device), torch.arange(n, device=rows.device) * height
    y = (draws.cut_y[:, None] + side).clamp_(0, height - 1) + first[:, None]
    x = (draws.cut_x[:, None] + side).clamp_(0, width - 1)
    rows.view(-1, channels).index_fill_(0, (y[:, :, None] * width + x[:, None, :]).view(-1), 0.0)


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) uint8 to zero mean and unit variance per channel over the training set, in `dtype`.

    The result is channels-last.
    """
    n, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(n, height, width * channels)
    return _normalize_rows(rows, dtype).view(n, height, width, channels).permute(0, 3, 1, 2)


def _normalize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H, W * 3) uint8 to the same shape in `dtype`."""
    compute = _at_least_float32(dtype)
    fill = _fill_statistics if torch.compiler.is_compiling() else _kept_statistics
    mean, scale = fill(rows.device, compute, rows.shape[2] // 3)
    return rows.to(compute).sub_(mean).mul_(scale).to(dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _fill_statistics(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """MEAN and 1 / STD of a row of pixels, each (W * 3,): so a CPU's innermost loop runs over 96 numbers, not 3.

    They are filled in on the device: copying them to a GPU would make it wait, in compiled code at every call.
    """

    def row(values: tuple[float, ...]) -> Tensor:
        return torch.stack([torch.full((), value, device=device, dtype=dtype) for value in values]).repeat(width)

    return row(MEAN), row(tuple(1 / value for value in STD))


_kept_statistics = functools.cache(_fill_statistics)


def receipt_words(indices: Tensor, draws: Draws) -> Tensor:
    """Four sums over samples, (4,) int64, of hashes of (index, draws): equal for equal samples in any order.

    Each hash has 32 bits, so the sums of a whole epoch stay exact, and sums of ranks add up to those of a run.
    """
    state = mix32(indices ^ 0x5BD1E995)
    for column in draws.columns().unbind(dim=1):
        state = mix32(state ^ mix32((column + 0x3C6EF372) & _MASK32))
    return torch.stack([mix32(state ^ salt).sum() for salt in (1, 2, 3, 4)])


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 to size - 1 at the border pixel, as in "reflect" padding."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
