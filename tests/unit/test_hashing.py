"""The hashing that all randomness of a run comes from."""

from __future__ import annotations

import numpy as np
import pytest

from cifar_dist.hashing import MASK64, derive, hash_indices, mix64

GOLDEN = 0x9E3779B97F4A7C15


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [(0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]), (1234567, [6457827717110365317, 3203168211198807973])],
)
def test_mix64_is_splitmix64(seed: int, outputs: list[int]) -> None:
    """The published first outputs of SplitMix64, whose state advances by the golden ratio."""
    assert [mix64((seed + (k + 1) * GOLDEN) & MASK64) for k in range(2)] == outputs


def test_arrays_hash_as_numbers_do() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert mix64(numbers).tolist() == [mix64(int(n)) for n in numbers]


def test_derive_is_pinned() -> None:
    assert [derive(0, "order", 0), derive(7, "order", 1), derive(0, "split")] == [
        7357623319394189897, 14190777521304089499, 17069704548006497299
    ]  # fmt: skip


def test_seeds_purposes_and_epochs_give_distinct_keys() -> None:
    values = {derive(seed, what, epoch) for seed in range(60) for what in ("order", "augment") for epoch in range(60)}
    assert len(values) == 60 * 2 * 60
    assert derive(7, "order", 1) != derive(8, "order", 0)
    assert derive(0, "order") != derive(0, "order", 0) != derive(0, 0, "order")
    assert derive(2**63 - 1, "init") < 2**64


def test_hashes_of_indices_are_distinct_and_uniform() -> None:
    n = 50_000
    hashes = hash_indices(np.arange(n), derive(3, "order", 4))
    assert len(np.unique(hashes)) == n
    ones = np.array([(hashes >> np.uint64(bit) & np.uint64(1)).sum() for bit in range(64)], np.float64)
    assert np.abs(ones - n / 2).max() < 5 * np.sqrt(n / 4)  # five standard deviations for each of 64 bits
    assert hash_indices(np.arange(3), derive(0, "split")).tolist() == [
        5849507935115365354, 12178813159924660265, 7737843302460065147
    ]  # fmt: skip
