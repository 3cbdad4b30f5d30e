"""The train/validation split, the permutation of an epoch, and the slice of a rank: pure functions of the seed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_dist.config import NUM_CLASSES, NUM_VALIDATION
from cifar_dist.errors import UserError
from cifar_dist.hashing import derive, hash_indices

Indices = npt.NDArray[np.int64]
# The split and the subsets are the same for every run, so they do not depend on its seed.
_SPLIT_KEY = derive(0, "split")


@dataclass(frozen=True)
class Split:
    """Sample indices, each ascending; `validation` may be empty."""

    train: Indices
    validation: Indices


def split(labels: Indices, train_on: str, subset: int | None) -> Split:
    """Split the official training set, with `labels` (50,000,), into stratified train and validation sets.

    Args:
        train_on: "train", or "all" for no validation set.
        subset: keep that many training samples; class counts differ by at most one.
    """
    of_class = _shuffled_classes(labels)
    held_out = NUM_VALIDATION // NUM_CLASSES if train_on == "train" else 0
    validation = np.concatenate([indices[:held_out] for indices in of_class])
    train = [indices[held_out:] for indices in of_class]
    return Split(_first_of_each(train, subset), np.sort(validation))


def stratified(labels: Indices, subset: int) -> Indices:
    """Indices of `subset` samples, ascending and always the same; class counts differ by at most one."""
    return _first_of_each(_shuffled_classes(labels), subset)


def _shuffled_classes(labels: Indices) -> list[Indices]:
    """The sample indices of each class, in a fixed random order."""
    key = hash_indices(np.arange(len(labels)), _SPLIT_KEY)
    of_class = [np.flatnonzero(labels == c) for c in range(NUM_CLASSES)]
    return [indices[np.argsort(key[indices], kind="stable")] for indices in of_class]


def _first_of_each(of_class: list[Indices], subset: int | None) -> Indices:
    if subset is not None:
        counts = [subset // NUM_CLASSES + (c < subset % NUM_CLASSES) for c in range(NUM_CLASSES)]
        of_class = [indices[:count] for indices, count in zip(of_class, counts, strict=True)]
    return np.sort(np.concatenate(of_class))


@dataclass(frozen=True)
class Order:
    """The order of samples in a run.

    An epoch is a permutation of `samples`, cut into global batches of `batch_size`; an incomplete last batch is
    dropped. `step` counts the optimizer steps of the run from 0.
    """

    samples: Indices
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(f"train.batch_size {self.batch_size} is more than the {len(self.samples)} samples.")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.samples) // self.batch_size

    @property
    def dropped_per_epoch(self) -> int:
        return len(self.samples) % self.batch_size

    def epoch(self, epoch: int) -> Indices:
        """The sample indices of an epoch in order, (steps_per_epoch * batch_size,)."""
        keys = hash_indices(self.samples, derive(self.seed, "order", epoch))
        return self.samples[np.argsort(keys, kind="stable")][: self.steps_per_epoch * self.batch_size]

    def rest_of_epoch(self, step: int, rank: int, world_size: int) -> Indices:
        """The indices that `rank` reads from `step` to the end of its epoch: its slice of each global batch."""
        epoch, first = divmod(step, self.steps_per_epoch)
        batches = self.epoch(epoch).reshape(self.steps_per_epoch, world_size, self.batch_size // world_size)
        return np.ascontiguousarray(batches[first:, rank]).reshape(-1)


def chunks_of_rank(indices: Indices, chunk_size: int, rank: int, world_size: int) -> list[Indices]:
    """The chunks of `rank`, if `indices` are cut into chunks of `chunk_size` and dealt to the ranks in turn.

    The last chunk may be smaller. The chunks do not depend on the world size, so neither do their results.
    """
    starts = range(0, len(indices), chunk_size)
    return [indices[start : start + chunk_size] for start in starts[rank::world_size]]
