"""Which samples make which step, on the labels of the real training set."""

from __future__ import annotations

import numpy as np
import pytest

from cifar_dist.data.order import Indices, Order, Split, chunks_of_rank, split, stratified
from cifar_dist.data.prepare.collection import Cifar10
from cifar_dist.errors import UserError


@pytest.fixture(scope="module")
def labels(cifar: Cifar10) -> Indices:
    return cifar.train_labels.astype(np.int64)


@pytest.fixture(scope="module")
def parts(labels: Indices) -> Split:
    return split(labels, "train", None)


def test_epoch_is_a_permutation_less_a_counted_tail(parts: Split) -> None:
    order = Order(parts.train, batch_size=1024, seed=0)
    assert (order.steps_per_epoch, order.dropped_per_epoch) == (43, 45_000 - 43 * 1024)
    epoch = order.epoch(5)
    assert len(epoch) == 43 * 1024 == len(np.unique(epoch))
    assert np.isin(epoch, parts.train).all()
    whole = Order(parts.train, batch_size=1000, seed=0)
    assert whole.dropped_per_epoch == 0
    assert np.array_equal(np.sort(whole.epoch(5)), parts.train)


def test_tail_differs_from_epoch_to_epoch(parts: Split) -> None:
    order = Order(parts.train, batch_size=1024, seed=0)
    assert len(np.unique(np.concatenate([order.epoch(0), order.epoch(1), order.epoch(2)]))) == 45_000


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_ranks_together_read_the_global_batch(parts: Split, world_size: int) -> None:
    order = Order(parts.train, batch_size=960, seed=11)
    size = 960 // world_size
    for step in (0, 17, 46, 47, 100):
        ranks = [order.rest_of_epoch(step, rank, world_size)[:size] for rank in range(world_size)]
        global_batch = order.epoch(step // order.steps_per_epoch).reshape(-1, 960)[step % order.steps_per_epoch]
        assert np.array_equal(np.concatenate(ranks), global_batch)
        assert len(np.unique(global_batch)) == 960


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_rest_of_epoch_is_its_tail(parts: Split, world_size: int) -> None:
    order = Order(parts.train, batch_size=960, seed=2)
    assert order.steps_per_epoch == 46
    for rank in range(world_size):
        whole = order.rest_of_epoch(46, rank, world_size)
        size = 960 // world_size
        assert len(whole) == 46 * size
        assert np.array_equal(order.rest_of_epoch(46 + 19, rank, world_size), whole[19 * size :])
    assert np.array_equal(order.rest_of_epoch(46, 0, 1), order.epoch(1))


def test_seeds_and_epochs_give_unrelated_permutations(parts: Split) -> None:
    epochs = [tuple(Order(parts.train, 1024, seed).epoch(epoch)[:32]) for seed in (7, 8) for epoch in (0, 1)]
    assert len(set(epochs)) == 4
    agreeing = (Order(parts.train, 1000, 7).epoch(1) == Order(parts.train, 1000, 8).epoch(0)).sum()
    assert agreeing < 10  # one is expected of two unrelated permutations


def test_first_indices_are_pinned(parts: Split, labels: Indices) -> None:
    order = Order(parts.train, batch_size=1024, seed=0)
    assert order.epoch(0)[:8].tolist() == [26516, 19552, 15077, 26334, 35529, 6083, 20447, 8093]
    assert order.epoch(1)[:8].tolist() == [35625, 5636, 2556, 41168, 11099, 1282, 27602, 26849]
    assert Order(parts.train, 1024, 7).epoch(1)[:8].tolist() == [20296, 29480, 17763, 37412, 12430, 43895, 33510, 5119]
    assert parts.validation[:8].tolist() == [8, 9, 21, 28, 35, 42, 44, 50]
    assert split(labels, "train", 123).train[:8].tolist() == [168, 723, 1152, 1590, 5720, 6178, 6405, 7440]


def test_order_is_uniform(parts: Split) -> None:
    """A sample's place in an epoch is uniform: chi-square over ten tenths of 300 epochs for one sample."""
    order = Order(parts.train[:1000], batch_size=1000, seed=5)
    places = np.array([np.flatnonzero(order.epoch(epoch) == order.samples[123])[0] for epoch in range(300)])
    counts = np.bincount(places // 100, minlength=10)
    assert ((counts - 30) ** 2 / 30).sum() < 9 + 5 * np.sqrt(18)


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 11 is more than the 10 samples"):
        Order(np.arange(10), batch_size=11, seed=0)


def test_split_is_stratified_and_disjoint(parts: Split, labels: Indices) -> None:
    assert np.bincount(labels[parts.validation]).tolist() == [500] * 10
    assert np.bincount(labels[parts.train]).tolist() == [4500] * 10
    assert np.array_equal(np.sort(np.concatenate([parts.train, parts.validation])), np.arange(50_000))
    assert (np.diff(parts.train) > 0).all()


def test_split_does_not_follow_the_subset(parts: Split, labels: Indices) -> None:
    """The split takes no seed at all, and validation is the same set whatever is trained on."""
    assert np.array_equal(split(labels, "train", 1000).validation, parts.validation)
    whole = split(labels, "all", None)
    assert np.array_equal(whole.train, np.arange(50_000))
    assert len(whole.validation) == 0


@pytest.mark.parametrize("subset", [1, 9, 10, 123, 4567, 45_000])
def test_subset_is_stratified(parts: Split, labels: Indices, subset: int) -> None:
    train = split(labels, "train", subset).train
    counts = np.bincount(labels[train], minlength=10)
    assert len(train) == subset == len(np.unique(train))
    assert counts.max() - counts.min() <= 1
    assert np.isin(train, parts.train).all()


@pytest.mark.parametrize("subset", [1, 25, 500, 10_000])
def test_part_of_the_test_set_is_stratified_and_fixed(subset: int) -> None:
    labels = np.arange(10_000) * 7 % 10
    part = stratified(labels, subset)
    assert np.array_equal(part, np.unique(part))
    assert len(part) == subset
    counts = np.bincount(labels[part], minlength=10)
    assert counts.max() - counts.min() <= 1
    assert set(part) <= set(stratified(labels, min(2 * subset, 10_000)))
    assert np.array_equal(part, stratified(labels, subset))


@pytest.mark.parametrize("world_size", [1, 3, 5, 7])
@pytest.mark.parametrize("num_samples", [10_000, 9_973, 499, 1])
def test_chunks_cover_all_once(num_samples: int, world_size: int) -> None:
    indices = np.random.default_rng(0).permutation(num_samples)
    dealt = [chunks_of_rank(indices, 500, rank, world_size) for rank in range(world_size)]
    alone = chunks_of_rank(indices, 500, 0, 1)
    assert np.array_equal(np.concatenate(alone), indices)
    # In turn, and each chunk the same as with one rank.
    for position, chunk in enumerate(alone):
        assert np.array_equal(dealt[position % world_size][position // world_size], chunk)
    assert sum(map(len, dealt)) == len(alone)
