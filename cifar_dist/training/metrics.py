"""Loss, accuracy and data receipt, summed on the device between two reads and all-reduced as one tensor.

All sums are of integers, losses in units of 2^-24, so they are the same for any number of ranks.
"""

import hashlib
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor

from cifar_dist.distributed import World, all_gather, all_reduce_sum
from cifar_dist.phase import Phase, in_phase

_ALL_REDUCE = Phase("the sums over a log window", waits=True)
_NEVER = 2**62  # greater than any step
_LOSS_UNIT = 2.0**-24
MAX_LOSS = 1e6  # mean of a micro-batch; an epoch's sum fits into int64


@dataclass(frozen=True)
class Window:
    """Sums over the samples of consecutive steps on all ranks. Windows add up."""

    loss_units: int = 0  # sum of losses, see `loss_units`
    num_correct: int = 0
    num_samples: int = 0
    # Micro-batches whose objective is not finite, and for each rank the steps whose gradient could not be summed.
    num_nonfinite: int = 0
    objective_units: int = 0  # like loss_units

    def __add__(self, other: "Window") -> "Window":
        return Window(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the classifier, without label smoothing, as in an evaluation."""
        return mean_loss(self.loss_units, self.num_samples)

    @property
    def objective(self) -> float:
        """Mean of what is minimised: with label smoothing and auxiliary classifiers."""
        return mean_loss(self.objective_units, self.num_samples)

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples


class Metrics:
    """Sums losses, correct predictions and receipt words. Adding does not wait for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        # Loss, three counts, objective, four receipt words (sums of 32-bit hashes).
        self._sums = torch.zeros(9, dtype=torch.int64, device=world.device)
        # The first step whose loss, and the first whose gradient, is not finite.
        self._first_nonfinite = torch.full((2,), _NEVER, dtype=torch.int64, device=world.device)
        self.receipt = Receipt()

    def add(self, step: int, counts: Tensor, receipt: Tensor) -> None:
        """Add one micro-batch of `step` (from 0).

        Args:
            counts: from `batch_counts`, (5,) int64.
            receipt: from augment.receipt_words, (4,) int64.
        """
        self._sums += torch.cat((counts, receipt))
        self._note(0, step, counts[3])

    def add_gradient(self, step: int, usable: Tensor) -> None:
        """Add whether the gradients of this rank in `step` (from 0) could be summed, () bool (see `exact_sum`)."""
        nonfinite = (~usable).long()
        self._sums[3] += nonfinite
        self._note(1, step, nonfinite)

    def _note(self, kind: int, step: int, nonfinite: Tensor) -> None:
        """Note `step` if `nonfinite`, () int64, is 1; without waiting for the device."""
        self._first_nonfinite[kind].clamp_(max=_NEVER - nonfinite * (_NEVER - step))  # the minimum with `step`

    def window(self) -> Window:
        """Wait for the device, sum over ranks, and reset the sums; a collective."""
        with in_phase(_ALL_REDUCE):
            loss, correct, n, nonfinite, objective, *words = all_reduce_sum(self._sums, self._world).tolist()
        self._sums.zero_()
        self.receipt.add(words, n)
        return Window(loss, correct, n, nonfinite, objective)

    def first_nonfinite(self) -> tuple[str, int, list[int]]:
        """What was not finite first, loss or gradient, in which step (from 1), and on which ranks.

        A collective; waits for the device.
        """
        losses, gradients = all_gather(self._first_nonfinite, self._world).T.tolist()
        what, steps = ("loss", losses) if min(losses) <= min(gradients) else ("gradient", gradients)
        return what, min(steps) + 1, [rank for rank, step in enumerate(steps) if step == min(steps)]


def batch_counts(loss: Tensor, objective: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Of a micro-batch, in the order of the fields of `Window`: sums of its losses in `loss_units`, and counts.

    Args:
        loss: mean cross-entropy of `logits` over the micro-batch, ().
        objective: what is minimised, also a mean, ().
        logits: (N, C).
        labels: (N,) int64.

    Returns (5,) int64.
    """
    correct, n = (logits.argmax(dim=1) == labels).sum(), len(labels)
    num, nonfinite = torch.full_like(correct, n), (~torch.isfinite(objective)).long()
    of_loss, of_objective = loss_units(torch.stack((loss, objective)), n)
    return torch.stack((of_loss, correct, num, nonfinite, of_objective))


def loss_units(loss: Tensor, num_samples: int) -> Tensor:
    """The sum of the losses of samples whose mean is `loss`, float of any shape, as int64 in units of 2^-24.

    These add up without rounding. A mean above `MAX_LOSS` counts as that, NaN as 0.
    """
    return (loss.double().nan_to_num(0.0).clamp(0.0, MAX_LOSS) * num_samples / _LOSS_UNIT).round().long()


def mean_loss(units: int, num_samples: int) -> float:
    """The mean over `num_samples` of a sum of `loss_units`."""
    return units * _LOSS_UNIT / num_samples


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
