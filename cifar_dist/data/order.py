"""Which samples make which step: pure functions of the seed, never of rank, world size or thread count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_dist.config import NUM_CLASSES, NUM_VALIDATION
from cifar_dist.errors import UserError
from cifar_dist.hashing import derive, hash_indices

Indices = npt.NDArray[np.int64]
# The validation split and debugging subsets are the same for every run, so they do not take its seed.
_SPLIT_KEY = derive(0, "split")


@dataclass(frozen=True)
class Split:
    """Sample indices, each ascending: what is trained on, and what is validated on (possibly nothing)."""

    train: Indices
    validation: Indices


def split(labels: Indices, train_on: str, subset: int | None) -> Split:
    """Cut the official training set, whose labels are (50,000,), into a stratified train and validation part.

    `subset` keeps that many training samples, the same share of each class to within one sample.
    """
    of_class = _shuffled_classes(labels)
    held_out = NUM_VALIDATION // NUM_CLASSES if train_on == "train" else 0
    validation = np.concatenate([indices[:held_out] for indices in of_class])
    train = [indices[held_out:] for indices in of_class]
    return Split(_first_of_each(train, subset), np.sort(validation))


def stratified(labels: Indices, subset: int) -> Indices:
    """Indices of `subset` samples, ascending and always the same ones; the classes' counts differ by one at most."""
    return _first_of_each(_shuffled_classes(labels), subset)


def _shuffled_classes(labels: Indices) -> list[Indices]:
    """The sample indices of each class, in an order that is always the same."""
    key = hash_indices(np.arange(len(labels)), _SPLIT_KEY)
    of_class = [np.flatnonzero(labels == c) for c in range(NUM_CLASSES)]
    return [indices[np.argsort(key[indices], kind="stable")] for indices in of_class]


def _first_of_each(of_class: list[Indices], subset: int | None) -> Indices:
    if subset is not None:
        shares = [subset // NUM_CLASSES + (c < subset % NUM_CLASSES) for c in range(NUM_CLASSES)]
        of_class = [indices[:share] for indices, share in zip(of_class, shares, strict=True)]
    return np.sort(np.concatenate(of_class))


@dataclass(frozen=True)
class Order:
    """The order of a run. An epoch is one permutation of `samples`, cut into global batches of `batch_size`;
    the tail that does not fill one is dropped. `step` counts optimizer steps over the whole run, from 0."""

    samples: Indices
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.batch_size {self.batch_size} is more than the {len(self.samples)} samples there are."
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.samples) // self.batch_size

    @property
    def dropped_per_epoch(self) -> int:
        return len(self.samples) % self.batch_size

    def epoch(self, epoch: int) -> Indices:
        """All sample indices of an epoch in order, shape (steps_per_epoch * batch_size,)."""
        keys = hash_indices(self.samples, derive(self.seed, "order", epoch))
        return self.samples[np.argsort(keys, kind="stable")][: self.steps_per_epoch * self.batch_size]

    def global_batch(self, step: int) -> Indices:
        """The sample indices of one step, shape (batch_size,)."""
        return self.rest_of_epoch(step, rank=0, world_size=1)[: self.batch_size]

    def rest_of_epoch(self, step: int, rank: int, world_size: int) -> Indices:
        """What `rank` reads from `step` to the end of that step's epoch: its slice of each global batch."""
        epoch, first = divmod(step, self.steps_per_epoch)
        batches = self.epoch(epoch).reshape(self.steps_per_epoch, world_size, self.batch_size // world_size)
        return np.ascontiguousarray(batches[first:, rank]).reshape(-1)


def chunks_of_rank(indices: Indices, chunk_size: int, rank: int, world_size: int) -> list[Indices]:
    """Cut `indices` into chunks, the last one possibly smaller, and deal them out in turn; (rank's share).

    The chunks do not depend on the world size, so each is computed alike wherever it goes.
    """
    starts = range(0, len(indices), chunk_size)
    return [indices[start : start + chunk_size] for start in starts[rank::world_size]]
