"""Flip, translation, cutout and normalisation of a batch on its device, with counter-based random bits.

The augmentation of a sample depends on (seed, epoch, sample index) only: it is the same on CPU and GPU, on any rank, in
any batch. The mixing function is lowbias32 (Chris Wellons, "Hash prospector").
"""

import functools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist import extension
from cifar_dist.config import AugmentConfig
from cifar_dist.data import cifar10
from cifar_dist.errors import UserError
from cifar_dist.hashing import derive

# For pixels from 0 to 255.
MEAN = tuple(255 * value for value in cifar10.MEAN)
STD = tuple(255 * value for value in cifar10.STD)
_MASK32 = 0xFFFFFFFF
# Multipliers of lowbias32. 2**32 is subtracted from the second, so that products with 32 bits fit into int64; the low
# 32 bits stay the same.
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
# Indices of a sample's random words; x and y are adjacent.
_FLIP, _SHIFT, _CUT = 0, slice(1, 3), slice(3, 5)
NUM_WORDS = 5
_FIRST_OWN_WORD = 64  # of an own augmentation; leaves room for words of built-in ones


@runtime_checkable
class Augmentation(Protocol):
    """What `augment.extra` names: a class of these objects, created without arguments on every rank.

    `num_words`: of random words that each sample has in each epoch.
    """

    num_words: int

    def __call__(self, images: Tensor, words: Tensor) -> Tensor:
        """Augment a micro-batch after the built-in augmentations, by `words` alone, which may be changed in place.

        Shapes: normalised images (N, 3, S, S), in float32 or the dtype of train.precision, to the same shape. S is 32,
        or 20, 24 and 28 with augment.low_resolution_share.
        words: (N, num_words) int64, uniform from 0 to 2**32 - 1. Must not wait for the device. It may be compiled.
        """


def own_augmentation(reference: str | None) -> Augmentation | None:
    """The augmentation that `augment.extra` refers to, tried on black images.

    Raises:
        UserError: it cannot be created, or returns something else than images.
    """
    if reference is None:
        return None
    extra: Augmentation = extension.create("augment.extra", reference, Augmentation)  # type: ignore[type-abstract]
    given = f"augment.extra is {reference}"
    if not isinstance(extra.num_words, int) or extra.num_words < 0:
        raise UserError(f"{given}, whose num_words is {extra.num_words!r}; valid: a whole number, 0 or more.")
    images, words = torch.zeros(2, 3, 32, 32), torch.zeros(2, extra.num_words, dtype=torch.int64)
    with extension.explained(f"{given}, but a call with images (2, 3, 32, 32)"):
        output = extra(images.contiguous(memory_format=torch.channels_last), words)
    if not isinstance(output, Tensor) or output.shape != images.shape:
        raise UserError(f"{given}, which does not return images of the shape that it gets.")
    return extra


def mix32(x: Tensor) -> Tensor:
    """Bijective mix of 32-bit numbers held in int64."""
    x = ((x ^ (x >> 16)) * _M1) & _MASK32
    x = ((x ^ (x >> 15)) * _M2) & _MASK32
    return x ^ (x >> 16)


def epoch_keys(seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """What the augmentation of all samples in `epoch` depends on, (5,) int64.

    The low and high 32 bits of the key of the epoch, those of the key of the run for alternating flips, and the last
    bit of `epoch`. A tensor, because compiled code would be compiled again for each epoch's numbers. Filled on the
    device: a copy to a GPU would synchronise.
    """
    keys = derive(seed, "augment", epoch), derive(seed, "flip")
    values = [*(half for key in keys for half in (key & _MASK32, key >> 32)), epoch & 1]
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in values])


def random_words(indices: Tensor, keys: Tensor, first: int = 0, num: int = NUM_WORDS) -> Tensor:
    """Random words `first` to `first + num - 1` of the samples `indices` (N,) int64: (K, N, num) int64, below 2**32.

    Args:
        keys: (K, 2) int64, the low and high 32 bits of each key.
    """
    base = mix32(mix32(indices ^ keys[:, :1]) ^ keys[:, 1:])
    # Any constant would do that sets words apart.
    counters = torch.arange(first + 1, first + num + 1, device=indices.device) * 0x3C6EF372
    return mix32((base[..., None] + counters) & _MASK32)


@dataclass(frozen=True)
class AugmentParams:
    """The augmentation of each sample: `flip` (N,) bool; shifts and cutout corners (N,) int64, in pixels."""

    flip: Tensor
    shift_x: Tensor
    shift_y: Tensor
    cut_x: Tensor
    cut_y: Tensor

    def columns(self) -> Tensor:
        """(N, 5) int64, for the data receipt."""
        return torch.stack((self.flip.long(), self.shift_x, self.shift_y, self.cut_x, self.cut_y), dim=1)


def sample_params(indices: Tensor, keys: Tensor, config: AugmentConfig, size: int = 32) -> AugmentParams:
    """Draw the augmentation of the samples `indices` (N,) int64; images are `size` pixels wide and high.

    Args:
        keys: of the epoch, from `epoch_keys`, on the device of `indices`.
    """
    num_keys = 2 if config.flip == "alternating" else 1
    words, *more = random_words(indices, keys[: 2 * num_keys].view(num_keys, 2)).unbind()
    if config.flip == "none":
        flip = torch.zeros_like(indices, dtype=torch.bool)
    elif config.flip == "random":
        flip = words[:, _FLIP] >> 31 == 1
    else:
        # One random bit per sample and run, inverted every epoch (Jordan, arXiv 2404.00498).
        flip = more[0][:, _FLIP] >> 31 != keys[4]
    # The high 32 bits of word * range: uniform to within range / 2**32.
    shift = (words[:, _SHIFT] * (2 * config.translate + 1) >> 32) - config.translate
    # The centre is any pixel, so the square may reach over the border, as in the paper.
    cut = (words[:, _CUT] * size >> 32) - config.cutout // 2
    return AugmentParams(flip, *shift.unbind(dim=1), *cut.unbind(dim=1))


def augment_batch(
    images: Tensor,
    indices: Tensor,
    keys: Tensor,
    config: AugmentConfig,
    dtype: torch.dtype,
    image_size: int | None,
    extra: Augmentation | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw and `apply` the augmentation of the samples `indices`, and return it with their `receipt_words`."""
    params = sample_params(indices, keys, config)
    output = apply(images, params, config.cutout, dtype, image_size)
    if extra is None:
        return output, receipt_words(indices, params)
    words = random_words(indices, keys[:2].view(1, 2), _FIRST_OWN_WORD, extra.num_words)[0]
    receipt = receipt_words(indices, params, words)
    return extra(output, words).to(dtype, memory_format=torch.channels_last), receipt


def apply(
    images: Tensor, params: AugmentParams, cutout: int, dtype: torch.dtype, image_size: int | None = None
) -> Tensor:
    """Augment and normalise: (N, 3, H, W) uint8 to the same shape in `dtype`, channels-last.

    Args:
        params: shifts must be smaller than H and W.
        image_size: resize to (N, 3, `image_size`, `image_size`).
    """
    n, channels, height, width = images.shape
    # With reflection a row is periodic: forwards, backwards without the two end pixels, forwards. Every shift of the
    # row and of its mirror image is a window of `width` pixels in it, which is copied as a whole.
    forward, backward = images.permute(0, 2, 3, 1), images.flip(3).permute(0, 2, 3, 1)
    periodic = torch.cat((forward, backward[:, :, 1:-1], forward), dim=2)
    windows = periodic.view(-1, channels).unfold(0, width, 1).transpose(1, 2)  # overlapping views, not copies
    rows, image = (torch.arange(size, device=images.device) for size in (height, n))
    y = _reflect(rows + params.shift_y[:, None], height)
    start = (params.shift_x + params.flip * (width - 1)) % (2 * width - 2)
    index = y * periodic.shape[2] + (image * (height * periodic.shape[2]) + start)[:, None]
    moved = windows.index_select(0, index.view(-1))
    output = _normalize_rows(moved.view(n, height, -1), dtype if image_size is None else _at_least_float32(dtype))
    if cutout:
        # When compiled, the mask is fused into the kernel; in eager mode it costs as much as everything above.
        cut = _cutout_by_mask if torch.compiler.is_compiling() else _cutout_by_index
        cut(output, params, cutout, channels)
    output = output.view(n, height, width, channels).permute(0, 3, 1, 2)
    if image_size is None:
        return output
    return F.interpolate(output, (image_size, image_size), mode="bilinear", antialias=True).to(dtype)


def _cutout_by_mask(rows: Tensor, params: AugmentParams, cutout: int, channels: int) -> None:
    """Zero the square of each image, in place: (N, H, W * `channels`)."""
    y = torch.arange(rows.shape[1], device=rows.device)
    x = torch.arange(rows.shape[2] // channels, device=rows.device)
    in_rows = (y >= params.cut_y[:, None]) & (y < params.cut_y[:, None] + cutout)
    in_columns = (x >= params.cut_x[:, None]) & (x < params.cut_x[:, None] + cutout)
    rows.masked_fill_(in_rows[:, :, None] & in_columns.repeat_interleave(channels, dim=1)[:, None, :], 0.0)


def _cutout_by_index(rows: Tensor, params: AugmentParams, cutout: int, channels: int) -> None:
    """As `_cutout_by_mask`. Positions outside an image are clamped to its border, which the square also covers."""
    n, height, width = len(rows), rows.shape[1], rows.shape[2] // channels
    side, first = torch.arange(cutout, device=rows.device), torch.arange(n, device=rows.device) * height
    y = (params.cut_y[:, None] + side).clamp_(0, height - 1) + first[:, None]
    x = (params.cut_x[:, None] + side).clamp_(0, width - 1)
    rows.view(-1, channels).index_fill_(0, (y[:, :, None] * width + x[:, None, :]).view(-1), 0.0)


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) uint8 to `dtype`, channels-last, with mean 0 and variance 1 per channel over the training set."""
    n, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(n, height, width * channels)
    return _normalize_rows(rows, dtype).view(n, height, width, channels).permute(0, 3, 1, 2)


def _normalize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H, W * 3) uint8 to the same shape in `dtype`."""
    compute = _at_least_float32(dtype)
    fill = _fill_statistics if torch.compiler.is_compiling() else _cached_statistics
    mean, scale = fill(rows.device, compute, rows.shape[2] // 3)
    return rows.to(compute).sub_(mean).mul_(scale).to(dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _fill_statistics(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """MEAN and 1 / STD, each repeated to (W * 3,): on a CPU the innermost loop then runs over 96 numbers, not 3.

    Filled on the device: a copy to a GPU would synchronise, in compiled code at every call.
    """

    def row(values: tuple[float, ...]) -> Tensor:
        return torch.stack([torch.full((), value, device=device, dtype=dtype) for value in values]).repeat(width)

    return row(MEAN), row(tuple(1 / value for value in STD))


_cached_statistics = functools.cache(_fill_statistics)


def receipt_words(indices: Tensor, params: AugmentParams, words: Tensor | None = None) -> Tensor:
    """Four sums over samples, (4,) int64, of hashes of (index, params): they do not depend on the order of samples.

    Each hash has 32 bits, so the sums of a whole epoch are exact, and those of all ranks can be added.

    Args:
        words: of an own augmentation, (N, W); they are hashed, too.
    """
    state = mix32(indices ^ 0x5BD1E995)
    columns = params.columns() if words is None else torch.cat((params.columns(), words), dim=1)
    for column in columns.unbind(dim=1):
        state = mix32(state ^ mix32((column + 0x3C6EF372) & _MASK32))
    return torch.stack([mix32(state ^ salt).sum() for salt in (1, 2, 3, 4)])


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 to size - 1 at the border pixel, as in "reflect" padding."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
