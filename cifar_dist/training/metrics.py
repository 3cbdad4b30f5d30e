"""Sums on the device between two log steps; one all-reduce of one small tensor brings them to the host."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor

from cifar_dist.distributed import World, all_gather, all_reduce_sum
from cifar_dist.place import Place, at

_SUMS_UP = Place("the sums over a log window", waits=True)
_NEVER = 2**62  # later than any step


@dataclass(frozen=True)
class Window:
    """Sums over the samples of some steps, on all ranks; windows add up."""

    loss_sum: float = 0.0
    num_hits: int = 0
    num_samples: int = 0
    num_nonfinite: int = 0

    def __add__(self, other: Window) -> Window:
        return Window(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_samples

    @property
    def accuracy(self) -> float:
        return self.num_hits / self.num_samples


class Metrics:
    """Adds up losses, hits and the data receipt without waiting for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        # Sums of 32-bit hashes over an epoch stay below 2**53, so float64 holds them exactly beside the rest.
        self._sums = torch.zeros(8, dtype=torch.float64, device=world.device)
        self._first_nonfinite = torch.full((), _NEVER, dtype=torch.int64, device=world.device)
        self.receipt = Receipt()

    def add(self, step: int, loss: Tensor, finite: Tensor, logits: Tensor, labels: Tensor, receipt: Tensor) -> None:
        """Take in a micro-batch of step `step` (from 0): mean loss (), whether all that was minimised is finite ()
        bool, logits (N, C), labels (N,), receipt words (4,) int64."""
        hits = (logits.argmax(dim=1) == labels).sum()
        n = torch.full_like(hits, len(labels))
        nonfinite = (~finite).long()
        self._first_nonfinite.clamp_(max=_NEVER - nonfinite * (_NEVER - step))
        self._sums += torch.cat((torch.stack((loss * len(labels), hits, n, nonfinite)).double(), receipt.double()))

    def window(self) -> Window:
        """Wait for the device, add up over ranks, and start anew."""
        with at(_SUMS_UP):
            loss, *counts = all_reduce_sum(self._sums, self._world).tolist()
        self._sums.zero_()
        hits, n, nonfinite, *words = map(int, counts)
        self.receipt.add(words, n)
        return Window(loss, hits, n, nonfinite)

    def first_nonfinite(self) -> tuple[int, list[int]]:
        """The first step (from 1) in which what was minimised was not finite on some rank, and on which; a collective,
        which waits for the device."""
        steps = all_gather(self._first_nonfinite, self._world).tolist()
        return min(steps) + 1, [rank for rank, step in enumerate(steps) if step == min(steps)]


@dataclass
class Receipt:
    """Evidence of what a run was fed: one digest per epoch over the set of (index, augmentation) pairs.

    A digest depends on neither order nor world size: the words of all samples are added up.
    """

    epochs: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=lambda: [0] * 4)
    num_samples: int = 0

    def add(self, words: list[int], num_samples: int) -> None:
        self.words = [a + b for a, b in zip(self.words, words, strict=True)]
        self.num_samples += num_samples

    def end_epoch(self) -> None:
        self.epochs.append(self._digest())
        self.words, self.num_samples = [0] * 4, 0

    def digests(self) -> list[str]:
        """One per epoch, the last perhaps of an unfinished one."""
        return [*self.epochs, *([self._digest()] if self.num_samples else [])]

    def _digest(self) -> str:
        text = ",".join(map(str, [self.num_samples, *self.words]))
        return hashlib.sha256(text.encode()).hexdigest()[:32]
