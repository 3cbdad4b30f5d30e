"""Sums of gradients without rounding, so that any number of processes trains the same model, to the bit.

Floating-point sums round, so their result depends on the order of their terms: on which process has which
micro-batches, and on the algorithm of the all-reduce. Here the gradient of each micro-batch is converted to 64-bit
integers, multiples of 2^-`FRACTION_BITS`, and those are added, first on each process and then over all of them. Sums of
integers do not round, so neither order nor grouping matters. docs/performance.md has the measured range of gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import PrecisionName

# One unit of the integers is 2^-FRACTION_BITS. fp16: of scaled gradients, most of which are multiples of 2^-24.
FRACTION_BITS: dict[PrecisionName, int] = {"bf16": 44, "fp32": 44, "fp16": 30, "fp64": 52}
_SUM_BITS = 62  # a sum must be below 2^62 units, which leaves a factor of 2 to the end of int64


class _Exchange(NamedTuple):
    """An all-reduce that may still run."""

    work: Any
    total: Tensor
    gradient: Tensor


class ExactSum:
    """DDP communication hook that adds the gradients of all micro-batches of a step, without rounding.

    DDP calls it in the backward pass of each micro-batch, once per bucket of parameters. Each process adds its own
    micro-batches. In the last one of a step the sums are all-reduced, and `finish` writes them into
    the gradients.

    An element that is infinite, NaN or too large to be added makes all gradients NaN on all processes. Whether there is
    one is sent with the last bucket.

    Args:
        parallel: has done two passes, since DDP rebuilds its buckets before the second.
        num_micro_batches: in a global batch, on all processes together.
        several_ranks: whether there is a process group.
    """

    def __init__(
        self, parallel: DistributedDataParallel, precision: PrecisionName, num_micro_batches: int, several_ranks: bool
    ) -> None:
        self._several_ranks = several_ranks
        self.last = False  # whether the current micro-batch is the last of this process in its step
        self._scale = 2.0 ** FRACTION_BITS[precision]
        self._limit = 2.0 ** (_SUM_BITS - FRACTION_BITS[precision]) / num_micro_batches
        self._extremes: list[Tensor] = []  # smallest and largest element of each bucket and micro-batch; NaN if one is
        self._usable = torch.ones(())  # whether all gradients of this process in the step could be added
        self._sums: dict[int, Tensor] = {}  # by bucket: (n + 1,) int64, the last element is for the flag
        self._exchanges: list[_Exchange] = []
        parallel.register_comm_hook(None, self._add)

    def _add(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        gradient, index = bucket.buffer(), bucket.index()
        self._extremes += torch.aminmax(gradient)
        units = (gradient * self._scale).round_()
        if index in self._sums:
            self._sums[index][:-1] += units.to(torch.int64)
        else:
            total = torch.empty(len(gradient) + 1, dtype=torch.int64, device=gradient.device)
            total[:-1] = units
            self._sums[index] = total
        if self.last:
            self._exchange(self._sums.pop(index), gradient, bucket.is_last())
        else:
            gradient.zero_()  # the .grad of its parameters is a part of it, and the next backward pass adds to that
        # Not a future of the all-reduce: a callback would run in a thread of gloo, which may outlive the interpreter.
        done: Future[Tensor] = Future()
        done.set_result(gradient)
        return done

    def _exchange(self, total: Tensor, gradient: Tensor, is_last: bool) -> None:
        if is_last:
            self._usable = torch.stack(self._extremes).abs_().amax() < self._limit
            self._extremes.clear()
            total[-1] = ~self._usable
        else:
            total = total[:-1]
        work = dist.all_reduce(total, async_op=True) if self._several_ranks else None
        self._exchanges.append(_Exchange(work, total, gradient))

    def finish(self) -> Tensor:
        """Wait for the all-reduces and write the sums into the gradients, after the last backward pass of a step.

        Returns whether all gradients of this process could be added, () bool.
        """
        for work, _, _ in self._exchanges:
            if work is not None:
                work.wait()
        last = self._exchanges[-1]
        unit = torch.where(last.total[-1] == 0, 1 / self._scale, torch.nan).to(last.gradient.dtype)
        for _, total, gradient in self._exchanges:
            gradient.copy_(total[: len(gradient)]).mul_(unit)
        self._exchanges.clear()
        return self._usable
