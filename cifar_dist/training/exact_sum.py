"""Sums of gradients without rounding, so that any number of processes trains the same model, to the bit.

Floating-point sums round, so their result depends on the order of their terms: on which process has which
micro-batches, and on the algorithm of the all-reduce. Here the gradient of each micro-batch is converted to 64-bit
integers, multiples of 2^-`FRACTION_BITS`, and those are added, first on each process and then over all of them. Sums of
integers do not round, so neither order nor grouping matters. docs/performance.md has the measured range of gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import PrecisionName

# One unit of the integers is 2^-FRACTION_BITS. fp16: of scaled gradients, most of which are multiples of 2^-24.
FRACTION_BITS: dict[PrecisionName, int] = {"bf16": 44, "fp32": 44, "fp16": 30, "fp64": 52}
_SUM_BITS = 62  # a sum must be below 2^62 units, which leaves a factor of 2 to the end of int64


class ExactSum:
    """DDP communication hook that adds the gradients of all micro-batches of a step, without rounding.

    DDP calls it at the end of the backward pass of each micro-batch, with the gradient of its only parameter (see
    `flat_network`). Each process adds its own micro-batches. In the last one of a step the sum is all-reduced, and
    `finish` writes it into the gradient.

    An element that is infinite, NaN or too large to be added makes the gradient NaN on all processes.

    Args:
        parallel: has one parameter, and has done two passes, since DDP makes its bucket anew before the second.
        num_micro_batches: in a global batch, on all processes together.
        several_ranks: whether there is a process group.
    """

    def __init__(
        self, parallel: DistributedDataParallel, precision: PrecisionName, num_micro_batches: int, several_ranks: bool
    ) -> None:
        (parameter,) = parallel.parameters()
        self._several_ranks = several_ranks
        self.last = False  # whether the current micro-batch is the last of this process in its step
        self._scale = 2.0 ** FRACTION_BITS[precision]
        self._limit = 2.0 ** (_SUM_BITS - FRACTION_BITS[precision]) / num_micro_batches
        self._extremes: list[Tensor] = []  # smallest and largest element of each micro-batch; NaN if one is
        self._total = torch.zeros(parameter.numel() + 1, dtype=torch.int64, device=parameter.device)  # and a flag
        self._usable: Tensor  # whether all gradients of this process in the step could be added
        self._gradient: Tensor
        self._work: Any = None  # the all-reduce
        parallel.register_comm_hook(None, self._add)

    def _add(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        gradient = bucket.buffer()
        units = (gradient * self._scale).round_()
        if self._extremes:
            self._total[:-1] += units.to(torch.int64)
        else:
            self._total[:-1] = units
        self._extremes += torch.aminmax(gradient)
        if self.last:
            self._gradient = gradient
            self._usable = torch.stack(self._extremes).abs_().amax() < self._limit
            self._extremes.clear()
            self._total[-1] = ~self._usable
            self._work = dist.all_reduce(self._total, async_op=True) if self._several_ranks else None
        else:
            gradient.zero_()  # the next backward pass adds to it
        # Not a future of the all-reduce: a callback would run in a thread of gloo, which may outlive the interpreter.
        done: Future[Tensor] = Future()
        done.set_result(gradient)
        return done

    def finish(self) -> Tensor:
        """Wait for the all-reduce and write the sum into the gradient, after the last backward pass of a step.

        Returns whether all gradients of this process could be added, () bool.
        """
        if self._work is not None:
            self._work.wait()
        unit = torch.where(self._total[-1] == 0, 1 / self._scale, torch.nan).to(self._gradient.dtype)
        self._gradient.copy_(self._total[:-1]).mul_(unit)
        return self._usable
