"""Augmentation of real images, held against plain numpy and plain integers."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment
from cifar_dist.data.prepare.collection import Cifar10
from cifar_dist.errors import UserError
from cifar_dist.hashing import derive

CUTOUT = AugmentConfig(flip="random", translate=4, cutout=12)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(scope="module")
def images(cifar: Cifar10) -> Tensor:
    """The first 500 training images, (500, 3, 32, 32) uint8, channels-last."""
    return torch.from_numpy(cifar.train_images[:500]).permute(0, 3, 1, 2)


def augmented(images: Tensor, indices: Tensor, seed: int, epoch: int, config: AugmentConfig) -> Tensor:
    params = augment.sample_params(indices, augment.epoch_keys(seed, epoch), config)
    return augment.apply(images, params, config.cutout, torch.float32)


def mix32(x: int) -> int:
    """lowbias32 on a Python integer."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def plain_words(index: int, key: int, first: int = 0, num: int = 5) -> list[int]:
    base = mix32(mix32(index ^ key & 0xFFFFFFFF) ^ key >> 32)
    counters = range(first + 1, first + num + 1)
    return [mix32(base + counter * 0x3C6EF372 & 0xFFFFFFFF) for counter in counters]


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_draws_equal_plain_integers(flip: str) -> None:
    config = AugmentConfig(flip=flip, translate=3, cutout=9)  # type: ignore[arg-type]
    indices = [0, 1, 7, 12_345, 49_999]
    for seed, epoch in ((0, 0), (5, 1), (2**63 - 1, 59)):
        rows = augment.sample_params(torch.tensor(indices), augment.epoch_keys(seed, epoch), config).columns().tolist()
        for index, row in zip(indices, rows, strict=True):
            words = plain_words(index, derive(seed, "augment", epoch))
            coin = plain_words(index, derive(seed, "flip"))[0] >> 31
            flips = {"none": 0, "random": words[0] >> 31, "alternating": coin ^ epoch & 1}
            shifts = [word * 7 // 2**32 - 3 for word in words[1:3]]
            corners = [word * 32 // 2**32 - 4 for word in words[3:]]
            assert row == [flips[flip], *shifts, *corners]


def test_draws_are_pinned() -> None:
    params = augment.sample_params(torch.arange(6), augment.epoch_keys(0, 0), AugmentConfig(translate=2, cutout=8))
    assert params.columns().tolist() == [
        [1, -2, -2, -1, 10], [1, -2, 1, 21, 25], [0, 2, 0, 18, 3],
        [1, -1, 1, -4, 16], [1, -2, 2, -1, 16], [1, 0, 0, -2, 6],
    ]  # fmt: skip
    assert augment.receipt_words(torch.arange(6), params).tolist() == [
        13759469336, 13432675023, 13210555676, 9496721825
    ]  # fmt: skip


def test_augmentation_of_a_sample_does_not_depend_on_its_batch(images: Tensor) -> None:
    indices = torch.arange(500) * 97
    whole = augmented(images, indices, 3, 4, CUTOUT)
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmented(images[shuffled], indices[shuffled], 3, 4, CUTOUT), whole[shuffled])
    for k in (0, 77, 499):
        assert torch.equal(augmented(images[k : k + 1], indices[k : k + 1], 3, 4, CUTOUT)[0], whole[k])
    # The image does not matter, the index, the epoch and the seed do.
    for other in (augmented(images, indices + 1, 3, 4, CUTOUT), augmented(images, indices, 3, 5, CUTOUT),
                  augmented(images, indices, 4, 4, CUTOUT)):  # fmt: skip
        assert (other != whole).flatten(1).any(dim=1).float().mean() > 0.95


def test_alternating_flip_alternates() -> None:
    indices, config = torch.arange(50_000), AugmentConfig(flip="alternating")
    flips = [augment.sample_params(indices, augment.epoch_keys(1, epoch), config).flip for epoch in range(4)]
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])
    assert abs(flips[0].double().mean().item() - 0.5) < 5 * 0.5 / 50_000**0.5
    assert not torch.equal(flips[0], augment.sample_params(indices, augment.epoch_keys(2, 0), config).flip)


def plain(image: npt.NDArray[np.uint8], row: list[int], translate: int, cutout: int) -> npt.NDArray[np.float32]:
    """One image (32, 32, 3), augmented step by step: mirror, pad, cut out a window, normalise, cover a square."""
    flip, shift_x, shift_y, cut_x, cut_y = row
    mirrored = image[:, ::-1] if flip else image
    padded = np.pad(mirrored, ((translate, translate), (translate, translate), (0, 0)), mode="reflect")
    top, left = translate + shift_y, translate + shift_x
    window = padded[top : top + 32, left : left + 32].astype(np.float32)
    scale = (1 / np.array(augment.STD)).astype(np.float32)
    result = (window - np.array(augment.MEAN, np.float32)) * scale
    if cutout:
        result[max(cut_y, 0) : max(cut_y + cutout, 0), max(cut_x, 0) : max(cut_x + cutout, 0)] = 0
    return result


@pytest.mark.parametrize(
    ("flip", "translate", "cutout"),
    [("none", 0, 0), ("random", 0, 0), ("none", 2, 0), ("none", 0, 8), ("alternating", 2, 0), ("random", 4, 12),
     ("random", 15, 32), ("alternating", 1, 1)],
)  # fmt: skip
def test_every_pixel_equals_plain_numpy(images: Tensor, flip: str, translate: int, cutout: int) -> None:
    config = AugmentConfig(flip=flip, translate=translate, cutout=cutout)  # type: ignore[arg-type]
    params = augment.sample_params(torch.arange(500), augment.epoch_keys(9, 3), config)
    result = augment.apply(images, params, cutout, torch.float32).permute(0, 2, 3, 1).numpy()
    pixels = images.permute(0, 2, 3, 1).numpy()
    for k, row in enumerate(params.columns().tolist()):
        assert np.array_equal(result[k], plain(pixels[k], row, translate, cutout)), f"image {k}, draws {row}"


def test_draws_are_uniform() -> None:
    """Chi-square over 50,000 samples of an epoch, and over 2,000 epochs of a sample; limits at 5 sigma."""
    many = augment.sample_params(torch.arange(50_000), augment.epoch_keys(0, 0), CUTOUT)
    one = [
        augment.sample_params(torch.tensor([4711]), augment.epoch_keys(0, epoch), CUTOUT).columns()
        for epoch in range(2000)
    ]
    ranges = [(0, 2), (-4, 9), (-4, 9), (-6, 32), (-6, 32)]
    for table in (many.columns(), torch.cat(one)):
        for column, (low, size) in zip(table.unbind(dim=1), ranges, strict=True):
            assert_uniform(column - low, size)
    assert_uniform((many.shift_x + 4) * 9 + many.shift_y + 4, 81)
    assert_uniform((many.cut_x + 6) * 32 + many.cut_y + 6, 1024)
    assert_uniform(many.flip * 9 + many.shift_x + 4, 18)


def assert_uniform(values: Tensor, size: int) -> None:
    counts = torch.bincount(values, minlength=size).double()
    assert len(counts) == size
    expected = len(values) / size
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_normalize_centres_the_training_set(cifar: Cifar10) -> None:
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for chunk in torch.from_numpy(cifar.train_images).chunk(25):
        normal = augment.normalize(chunk.permute(0, 3, 1, 2), torch.float64)
        total += normal.sum(dim=(0, 2, 3))
        squares += normal.square().sum(dim=(0, 2, 3))
    n = 50_000 * 32 * 32
    assert (total / n).abs().max() < 1e-3
    assert ((squares / n - (total / n) ** 2).sqrt() - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layout(images: Tensor, dtype: torch.dtype) -> None:
    params = augment.sample_params(torch.arange(500), augment.epoch_keys(0, 0), CUTOUT)
    result = augment.apply(images, params, 12, dtype)
    exact = augment.apply(images, params, 12, torch.float64)
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result.double() - exact).abs().max() < {torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, 2**-7)
    # Planes in memory instead of pixels give the same.
    assert torch.equal(augment.apply(images.contiguous(), params, 12, dtype), result)
    nothing = augment.sample_params(
        torch.arange(500), augment.epoch_keys(0, 0), AugmentConfig(flip="none", translate=0)
    )
    assert torch.equal(augment.apply(images, nothing, 0, dtype), augment.normalize(images, dtype))
    assert augment.normalize(images.contiguous(), dtype).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_images_are_means_under_triangles(images: Tensor, dtype: torch.dtype) -> None:
    """Antialiased bilinear interpolation: each of 24 pixels is a weighted mean over 32/24 pixels to each side."""
    params = augment.sample_params(torch.arange(500), augment.epoch_keys(0, 0), CUTOUT)
    distance = np.abs((np.arange(24)[:, None] + 0.5) * 32 / 24 - (np.arange(32) + 0.5))
    weights = np.maximum(0, 1 - distance * 24 / 32)
    weights /= weights.sum(axis=1, keepdims=True)
    full = augment.apply(images, params, 12, torch.float64).numpy()
    result = augment.apply(images, params, 12, dtype, 24)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    error = np.abs(result.double().numpy() - weights @ full @ weights.T).max()
    assert error < {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2**-7)


def test_traces_into_one_graph(images: Tensor) -> None:
    """torch.compile takes it whole and without a warning, and the kept constants are not mixed up between dtypes."""
    indices = torch.arange(500)
    torch._dynamo.reset()
    compiled = torch.compile(augment.augment_batch, backend="eager", fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        for dtype, side in itertools.product(DTYPES, (None, 24)):
            counters.clear()
            for epoch in range(3):
                batch = images, indices, augment.epoch_keys(2**63 - 1, epoch), CUTOUT, dtype, side
                assert all(map(torch.equal, compiled(*batch), augment.augment_batch(*batch)))
            assert counters["stats"]["unique_graphs"] == 1  # not one for each epoch


def receipt(indices: Tensor, epoch: int = 0) -> Tensor:
    return augment.receipt_words(indices, augment.sample_params(indices, augment.epoch_keys(0, epoch), CUTOUT))


def test_receipt_is_a_sum_over_samples() -> None:
    indices = torch.randperm(50_000, generator=torch.Generator().manual_seed(1))
    whole = receipt(indices)
    assert torch.equal(receipt(indices.flip(0)), whole)
    assert torch.equal(receipt(indices.sort().values), whole)
    for parts in (2, 3, 8):
        assert torch.equal(torch.stack([receipt(part) for part in indices.chunk(parts)]).sum(dim=0), whole)
    # Metrics add them up in float64, which is exact up to 2**53.
    assert whole.max() < 2**53
    in_floats = torch.stack([receipt(part).double() for part in indices.chunk(390)]).sum(dim=0)
    assert in_floats.long().tolist() == whole.tolist()


def test_receipt_changes_with_every_sample_and_parameter() -> None:
    indices = torch.arange(1000)
    whole = receipt(indices)
    changed = indices.clone()
    changed[500] = 1000
    assert (receipt(changed) != whole).all()
    assert (receipt(indices, epoch=1) != whole).all()
    doubled = indices.clone()
    doubled[500] = doubled[501]
    assert (receipt(doubled) != whole).all()
    params = augment.sample_params(indices, augment.epoch_keys(0, 0), CUTOUT)
    params.shift_x[3] += 1
    assert (augment.receipt_words(indices, params) != whole).all()


class Brighten:
    """Adds to each image its first word, as a fraction; keeps the words that it gets in `seen`."""

    num_words = 3

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def __call__(self, images: Tensor, words: Tensor) -> Tensor:
        self.seen = words.clone()
        return images + (words[:, 0] / 2**32).to(images.dtype)[:, None, None, None]


class Smaller(Brighten):
    def __call__(self, images: Tensor, words: Tensor) -> Tensor:  # noqa: ARG002
        return images[:, :, 1:]


class Negative(Brighten):
    num_words = -1


class NoWords:
    def __call__(self, images: Tensor, words: Tensor) -> Tensor:  # noqa: ARG002
        return images


def test_own_augmentation_has_words_of_its_own(images: Tensor) -> None:
    """Of seed, epoch and sample; the draws of the others stay. The receipt tells whether and how it was on."""
    extra = augment.own_augmentation(f"{__name__}:Brighten")
    assert isinstance(extra, Brighten)
    indices, keys = torch.arange(500) * 90, augment.epoch_keys(7, 3)
    plain, without = augment.augment_batch(images, indices, keys, CUTOUT, torch.float32, None)
    bright, receipt = augment.augment_batch(images, indices, keys, CUTOUT, torch.float32, None, extra)
    expected = [plain_words(int(index), derive(7, "augment", 3), 64, 3) for index in indices]
    assert extra.seen.tolist() == expected
    assert torch.equal(bright, plain + torch.tensor([words[0] / 2**32 for words in expected])[:, None, None, None])
    extra.num_words = 2
    assert len({tuple(receipt.tolist()), tuple(without.tolist()), tuple(
        augment.augment_batch(images, indices, keys, CUTOUT, torch.float32, None, extra)[1].tolist()
    )}) == 3  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_augmentation_is_compiled(images: Tensor, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(augment.augment_batch, backend="eager", fullgraph=True, dynamic=False)
    batch = images, torch.arange(500), augment.epoch_keys(7, 3), CUTOUT, dtype, 24, Brighten()
    output, receipt = compiled(*batch)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, (output, receipt), augment.augment_batch(*batch)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Smaller", "which does not return images of the shape that it gets"),
        ("Negative", "whose num_words is -1; valid: a whole number, 0 or more"),
        ("NoWords", "which returned an object of type NoWords instead of one of type Augmentation"),
        ("Brihgten", "Did you mean .*:Brighten"),
    ],
)
def test_unusable_own_augmentations(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        augment.own_augmentation(f"{__name__}:{name}")
