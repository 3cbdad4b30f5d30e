"""Loss, accuracy and data receipt, summed on the device between two reads and all-reduced as one tensor."""

import hashlib
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor

from cifar_dist.distributed import World, all_gather, all_reduce_sum
from cifar_dist.phase import Phase, in_phase

_ALL_REDUCE = Phase("the sums over a log window", waits=True)
_NEVER = 2**62  # greater than any step


@dataclass(frozen=True)
class Window:
    """Sums over the samples of consecutive steps on all ranks. Windows add up."""

    loss_sum: float = 0.0
    num_correct: int = 0
    num_samples: int = 0
    num_nonfinite: int = 0  # micro-batches whose loss is infinite or NaN

    def __add__(self, other: "Window") -> "Window":
        return Window(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_samples

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples


class Metrics:
    """Sums losses, correct predictions and receipt words. Adding does not wait for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        # Loss, three counts, four receipt words: sums of 32-bit hashes, below 2**53 in an epoch, so exact in float64.
        self._sums = torch.zeros(8, dtype=torch.float64, device=world.device)
        self._first_nonfinite = torch.full((), _NEVER, dtype=torch.int64, device=world.device)
        self.receipt = Receipt()

    def add(self, step: int, loss: Tensor, finite: Tensor, logits: Tensor, labels: Tensor, receipt: Tensor) -> None:
        """Add one micro-batch of `step` (from 0).

        Args:
            loss: mean over the micro-batch, ().
            finite: whether the minimised loss, auxiliary ones included, is finite, () bool.
            logits: (N, C).
            labels: (N,) int64.
            receipt: from augment.receipt_words, (4,) int64.
        """
        correct = (logits.argmax(dim=1) == labels).sum()
        n = torch.full_like(correct, len(labels))
        nonfinite = (~finite).long()
        # The minimum with `step` if it is not finite, without waiting for the device.
        self._first_nonfinite.clamp_(max=_NEVER - nonfinite * (_NEVER - step))
        self._sums += torch.cat((torch.stack((loss * len(labels), correct, n, nonfinite)).double(), receipt.double()))

    def window(self) -> Window:
        """Wait for the device, sum over ranks, and reset the sums; a collective."""
        with in_phase(_ALL_REDUCE):
            loss, *counts = all_reduce_sum(self._sums, self._world).tolist()
        self._sums.zero_()
        correct, n, nonfinite, *words = map(int, counts)
        self.receipt.add(words, n)
        return Window(loss, correct, n, nonfinite)

    def first_nonfinite(self) -> tuple[int, list[int]]:
        """The first step (from 1) with a loss that is not finite, and its ranks; a collective, waits for the device."""
        steps = all_gather(self._first_nonfinite, self._world).tolist()
        return min(steps) + 1, [rank for rank, step in enumerate(steps) if step == min(steps)]


@dataclass
class Receipt:
    """Digest per epoch over the set of (sample index, augmentation) pairs that were trained on.

    Words are summed over samples, so a digest depends on neither order nor number of ranks.
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
        """One digest per epoch, including the current one if it has begun."""
        return [*self.epochs, *([self._digest()] if self.num_samples else [])]

    def _digest(self) -> str:
        text = ",".join(map(str, [self.num_samples, *self.words]))
        return hashlib.sha256(text.encode()).hexdigest()[:32]
