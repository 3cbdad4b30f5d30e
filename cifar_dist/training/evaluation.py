"""Scores that do not depend on the number of ranks.

The samples are cut into chunks of a fixed size, and each chunk is computed by one rank. So every forward pass has the
same samples and the same shape for any number of ranks, and only integers are summed over ranks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

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
from cifar_dist.phase import SLOW_S, Phase, set_phase
from cifar_dist.training.metrics import MAX_LOSS, loss_units, mean_loss
from cifar_dist.training.precision import Precision, reproducible

PROBABILITY_UNITS = 10**6
Progress: TypeAlias = Callable[[int, int], None]
"""Called with a number of finished batches, and the number of all of them."""


@dataclass(frozen=True)
class Score:
    """Counts over `n` samples.

    confusion[i][j]: samples of class i predicted as class j. confusion_tta: the same for the mean logits over several
    views of each image; None without test-time augmentation. loss: mean cross-entropy. answers: of each sample, in the
    given order, label, predicted class, and probability of that class in units of 1 / PROBABILITY_UNITS; (n, 3) int64.
    """

    n: int
    loss: float
    confusion: list[list[int]]
    confusion_tta: list[list[int]] | None
    answers: Tensor

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion)) / self.n

    @property
    def accuracy_tta(self) -> float | None:
        return None if self.confusion_tta is None else float(np.trace(self.confusion_tta)) / self.n

    @property
    def class_accuracy(self) -> list[float | None]:
        """Recall of each class; None for a class without samples."""
        return [row[c] / sum(row) if sum(row) else None for c, row in enumerate(self.confusion)]


def bn_samples(split: Split, config: EvalConfig) -> Indices:
    """Training samples for batch-norm statistics, (eval.bn_samples,); the same for every run and seed."""
    return Order(split.train, len(split.train), derive(0, "recalibrate")).epoch(0)[: config.bn_samples]


@dataclass(frozen=True)
class Evaluator:
    """Recalibrates and scores `model`, the raw and uncompiled one, over all ranks. All methods are collectives."""

    model: nn.Module
    config: EvalConfig
    precision: Precision
    world: World

    @property
    def norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        return [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    @torch.no_grad()
    def recalibrate(self, loader: BetonLoader, samples: Indices) -> None:
        """Set all batch-norm statistics to their mean over chunks of training samples without augmentation.

        Each chunk's statistics depend on the chunk alone. Their mean, in float64 and in the order of the chunks, is
        therefore the same for any number of ranks. The mode of the model stays as it was.

        Args:
            samples: indices (N,). A last chunk that is not full is dropped, unless it is the only one.
        """
        norms = self.norms
        if not norms:
            return
        world, chunk_size = self.world, self.config.batch_size
        num_chunks = max(1, len(samples) // chunk_size)
        samples = samples[: num_chunks * chunk_size]
        num_statistics = sum(2 * norm.num_features for norm in norms)
        table = torch.zeros(num_chunks, num_statistics, dtype=torch.float64, device=world.device)
        with reproducible(world.device):
            batches = self._batches(loader, samples)
            for chunk, batch in zip(range(world.rank, num_chunks, world.size), batches, strict=True):
                torch.manual_seed(chunk)  # of the dropout of own networks before a batch norm
                with self.precision.autocast():
                    update_bn([normalize(batch.images, self.precision.inputs)], self.model)
                table[chunk] = torch.cat([x for norm in norms for x in _statistics(norm)])
        mean = all_reduce_sum(table, world).mean(dim=0)
        parts = iter(torch.split(mean, [norm.num_features for norm in norms for _ in range(2)]))
        for norm in norms:
            for buffer in _statistics(norm):
                buffer.copy_(next(parts))
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(num_chunks)

    @torch.no_grad()
    def score(
        self, loader: BetonLoader, samples: Indices, tta: str = "none", progress: Progress | None = None
    ) -> Score:
        """Classify each of `samples` (N,) of the loader's file once, in eval mode. `tta` as in `eval.tta`.

        `progress` gets the number of finished batches of this rank, and of all of them.
        """
        was_training = self.model.training
        self.model.eval()
        with reproducible(self.world.device):
            confusion, units, answers = self._count(self._batches(loader, samples, progress), len(samples), tta)
        self.model.train(was_training)
        plain, augmented = all_reduce_sum(confusion, self.world).view(2, NUM_CLASSES, NUM_CLASSES).tolist()
        n = int(np.sum(plain))
        if n != len(samples):
            raise AssertionError(f"{n} samples were scored instead of {len(samples)}")
        total, num_unusable = all_reduce_sum(units, self.world).tolist()
        loss = math.nan if num_unusable else mean_loss(total, n)
        return Score(n, loss, plain, None if tta == "none" else augmented, all_reduce_sum(answers, self.world))

    def _count(self, batches: Iterator[Batch], num_samples: int, tta: str) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's counts, losses and answers.

        Confusion, without and with TTA: (2, C * C) int64. Losses: (2,) int64, their sum in units, and the number of
        chunks whose loss is not finite or too large. Answers: (N, 3) int64, see `Score`; 0 for samples of other ranks.
        """
        device, dtype = self.world.device, self.precision.parameters
        confusion = torch.zeros(2, NUM_CLASSES * NUM_CLASSES, dtype=torch.int64, device=device)
        units = torch.zeros(2, dtype=torch.int64, device=device)
        answers = torch.zeros(num_samples, 3, dtype=torch.int64, device=device)
        own_parts = torch.split(answers, self.config.batch_size)[self.world.rank :: self.world.size]
        for batch, part in zip(batches, own_parts if num_samples else (), strict=True):
            images = normalize(batch.images, self.precision.inputs)
            with self.precision.autocast():
                logits = self.model(images).to(dtype)
                mean = logits
                for view, weight in further_views(images, tta):
                    mean = mean + weight * self.model(view).to(dtype)
            loss = F.cross_entropy(logits, batch.labels)
            units += torch.stack((loss_units(loss, len(batch.labels)), (~(loss < MAX_LOSS)).long()))
            predicted = logits.argmax(dim=1)
            probability = logits.double().softmax(dim=1).gather(1, predicted[:, None])[:, 0]
            units_of_it = (probability.nan_to_num(0.0) * PROBABILITY_UNITS).round().long()
            part.copy_(torch.stack((batch.labels, predicted, units_of_it), dim=1))
            for k, outputs in enumerate((logits, mean)):
                # By comparison: bincount would make the host wait for the GPU to know the size of its result.
                cells = batch.labels * NUM_CLASSES + outputs.argmax(dim=1)
                confusion[k] += (cells[:, None] == torch.arange(NUM_CLASSES**2, device=device)).sum(dim=0)
        return confusion, units, answers

    def _batches(self, loader: BetonLoader, samples: Indices, progress: Progress | None = None) -> Iterator[Batch]:
        """This rank's chunks of `samples`."""
        chunks = chunks_of_rank(samples, self.config.batch_size, self.world.rank, self.world.size)
        if not chunks:
            set_phase(Phase("evaluation, without a batch"))
            return
        num = len(chunks)
        # FFCV compiles in the first batch.
        first = Phase(f"evaluation, batch 1 of {num}", limit_s=SLOW_S, memory_setting="eval.batch_size")
        set_phase(first)
        # Only the last chunk of all may be short. It is also the last of its rank, so the loader cuts the same chunks.
        for k, batch in enumerate(loader.read(np.concatenate(chunks), self.config.batch_size)):
            yield batch
            set_phase(first._replace(name=f"evaluation, batch {min(k + 2, num)} of {num}", limit_s=0.0))
            if progress is not None:
                progress(k + 1, num)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def further_views(images: Tensor, tta: str) -> Iterator[tuple[Tensor, float]]:
    """Pairs (view, weight) beside the images themselves, whose weight is 1. images and views: (N, 3, H, W)."""
    if tta == "none":
        return
    yield images.flip(3), 1.0
    if tta == "six":
        height, width = images.shape[2:]
        bordered = F.pad(images, (1, 1, 1, 1), mode="reflect")
        for corner in (0, 2):  # shifted by one pixel to the lower right, then to the upper left
            shifted = bordered[:, :, corner : corner + height, corner : corner + width]
            yield shifted, 0.5
            yield shifted.flip(3), 0.5
