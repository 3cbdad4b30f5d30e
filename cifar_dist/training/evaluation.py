"""Scores that do not depend on the number of devices.

The samples are cut into chunks of a fixed size, whatever the world size; a rank computes whole chunks. So every
forward pass sees the same samples in the same shape on any number of ranks, and only integers are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cifar_dist.config import NUM_CLASSES, EvalConfig
from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Indices, Order, Split, chunks_of_rank
from cifar_dist.distributed import World, all_reduce_sum
from cifar_dist.hashing import derive
from cifar_dist.place import SLOW_S, Place, go
from cifar_dist.training.precision import NumberFormat, reproducible


@dataclass(frozen=True)
class Score:
    """Counts over `n` samples. confusion[i][j]: samples of class i that were taken for class j; the same for the
    mean over several views of an image in `confusion_tta`, None without test-time augmentation."""

    n: int
    loss: float
    confusion: list[list[int]]
    confusion_tta: list[list[int]] | None

    @property
    def accuracy(self) -> float:
        return _diagonal(self.confusion) / self.n

    @property
    def accuracy_tta(self) -> float | None:
        return None if self.confusion_tta is None else _diagonal(self.confusion_tta) / self.n

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of each class's samples that were recognised; None for a class without samples."""
        return [row[c] / sum(row) if sum(row) else None for c, row in enumerate(self.confusion)]


def _diagonal(confusion: list[list[int]]) -> int:
    return sum(row[c] for c, row in enumerate(confusion))


def calibration_samples(split: Split, config: EvalConfig) -> Indices:
    """The training samples over which batch-norm statistics are taken: the same ones for every run and seed."""
    return Order(split.train, len(split.train), derive(0, "recalibrate")).epoch(0)[: config.bn_samples]


@torch.no_grad()
def recalibrate(
    model: nn.Module, loader: BetonLoader, samples: Indices, chunk_size: int, number_format: NumberFormat, world: World
) -> None:
    """Set all batch-norm statistics of `model` to their mean over chunks of training samples, unaugmented.

    `update_bn` takes the statistics of one chunk at a time. A layer's statistics in training mode depend on the
    chunk alone, so the mean over chunks, taken in float64 in their order, is the same for any world size.

    Args:
        model: the raw model; it ends in the mode it came in.
        samples: sample indices (N,); the tail that fills no chunk is left out, unless there is no full one.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    num_chunks = max(1, len(samples) // chunk_size)
    samples = samples[: num_chunks * chunk_size]
    table = torch.zeros(
        num_chunks, sum(2 * norm.num_features for norm in norms), dtype=torch.float64, device=world.device
    )
    with reproducible(world.device):
        batches = _my_batches(loader, samples, chunk_size, world)
        for chunk, batch in zip(range(world.rank, num_chunks, world.size), batches, strict=True):
            with number_format.autocast():
                update_bn([normalize(batch.images, number_format.inputs)], model)
            table[chunk] = torch.cat([x for norm in norms for x in _statistics(norm)])
    mean = all_reduce_sum(table, world).mean(dim=0)
    parts = iter(torch.split(mean, [norm.num_features for norm in norms for _ in range(2)]))
    for norm in norms:
        for buffer in _statistics(norm):
            buffer.copy_(next(parts))
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(num_chunks)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def score(
    model: nn.Module,
    loader: BetonLoader,
    samples: Indices,
    chunk_size: int,
    number_format: NumberFormat,
    world: World,
    tta: str = "none",
) -> Score:
    """Classify each of `samples` (N,) once, over all ranks, with the raw, uncompiled `model` in eval mode."""
    was_training = model.training
    model.eval()
    with reproducible(world.device):
        confusion, loss = _count(model, _my_batches(loader, samples, chunk_size, world), number_format, world, tta)
    model.train(was_training)
    plain, augmented = all_reduce_sum(confusion, world).view(2, NUM_CLASSES, NUM_CLASSES).tolist()
    n = int(np.sum(plain))
    if n != len(samples):
        raise AssertionError(f"{n} samples were scored instead of {len(samples)}")
    return Score(n, all_reduce_sum(loss, world).item() / n, plain, None if tta == "none" else augmented)


def _count(
    model: nn.Module, batches: Iterator[Batch], number_format: NumberFormat, world: World, tta: str
) -> tuple[Tensor, Tensor]:
    """This rank's confusion counts, without and with augmentation (2, C * C) int64, and sum of losses () float64."""
    confusion = torch.zeros(2, NUM_CLASSES * NUM_CLASSES, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        images = normalize(batch.images, number_format.inputs)
        with number_format.autocast():
            logits = model(images).to(number_format.parameters)
            mean = logits
            for view, weight in _further_views(images, tta):
                mean = mean + weight * model(view).to(number_format.parameters)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum")
        for which, outputs in enumerate((logits, mean)):
            # Counting by comparison: bincount would make a GPU wait for its result's size.
            cells = batch.labels * NUM_CLASSES + outputs.argmax(dim=1)
            confusion[which] += (cells[:, None] == torch.arange(NUM_CLASSES**2, device=cells.device)).sum(dim=0)
    return confusion, loss


def _further_views(images: Tensor, tta: str) -> Iterator[tuple[Tensor, float]]:
    """(view, weight) beside the images themselves, whose weight is 1; images and views: (N, 3, H, W)."""
    if tta == "none":
        return
    yield images.flip(3), 1.0
    if tta == "six":
        height, width = images.shape[2:]
        bordered = F.pad(images, (1, 1, 1, 1), mode="reflect")
        for corner in (0, 2):  # a pixel down right, a pixel up left
            shifted = bordered[:, :, corner : corner + height, corner : corner + width]
            yield shifted, 0.5
            yield shifted.flip(3), 0.5


def _my_batches(loader: BetonLoader, samples: Indices, chunk_size: int, world: World) -> Iterator[Batch]:
    mine = chunks_of_rank(samples, chunk_size, world.rank, world.size)
    if not mine:
        return
    first = Place(f"evaluation, batch 1 of {len(mine)}", limit_s=SLOW_S, memory="eval.batch_size")  # FFCV compiles
    go(first)
    # Only the last chunk of all may be short, and it is then the last of its rank, so FFCV cuts alike.
    for k, batch in enumerate(loader.read(np.concatenate(mine), chunk_size)):
        yield batch
        go(first._replace(what=f"evaluation, batch {min(k + 2, len(mine))} of {len(mine)}", limit_s=0.0))
