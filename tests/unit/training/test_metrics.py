"""Sums of a log window, and the data receipt."""

from __future__ import annotations

import pytest
import torch

from cifar_dist.distributed import World
from cifar_dist.training.metrics import Metrics, Receipt, Window, batch_counts, loss_units, mean_loss

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def test_metrics_add_up_and_count_what_is_not_finite() -> None:
    metrics = Metrics(ALONE)
    logits, labels = torch.tensor([[3.0, 0], [0, 1], [5, 0]]), torch.tensor([0, 0, 0])
    finite, infinite = torch.tensor(1.75), torch.tensor(torch.nan)
    metrics.add(6, batch_counts(torch.tensor(1.5), finite, logits, labels), torch.tensor([1, 2, 3, 4]))
    metrics.add(7, batch_counts(torch.tensor(2.5), infinite, logits[:1], labels[:1]), torch.tensor([10, 20, 30, 2**45]))
    window = metrics.window() + Window()
    assert (window.num_samples, window.num_nonfinite) == (4, 1)
    assert metrics.first_nonfinite() == ("loss", 8, [0])
    assert (window.loss, window.objective, window.accuracy) == (1.75, 3 * 1.75 / 4, 0.75)
    assert metrics.receipt.words == [11, 22, 33, 2**45 + 4]
    metrics.add(8, batch_counts(torch.tensor(2.0), finite, logits, labels), torch.zeros(4, dtype=torch.int64))
    assert metrics.window().loss == 2.0


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.75, 3.0), (2**-27, 2**-24 / 2), (torch.inf, 4e6), (5e6, 4e6), (torch.nan, 0.0)]
)
def test_losses_in_units(loss: float, expected: float) -> None:
    """Of four samples; half a unit rounds to none. Beyond a mean of a million they do not grow."""
    units = loss_units(torch.tensor(loss), 4)
    assert units.dtype == torch.int64
    assert mean_loss(int(units), 1) == pytest.approx(expected, abs=2**-25)


def test_receipt_is_one_digest_per_epoch() -> None:
    receipt, other = Receipt(), Receipt()
    receipt.add([1, 2, 3, 4], 5)
    receipt.add([10, 20, 30, 40], 5)
    other.add([11, 22, 33, 44], 10)
    receipt.end_epoch()
    other.end_epoch()
    assert receipt.digests() == other.digests()
    receipt.add([1, 1, 1, 1], 1)
    assert len(receipt.digests()) == 2
    assert receipt.digests()[0] != receipt.digests()[1]
