"""All ranks stop after the same step, although a signal reaches each rank at another moment, or only one rank."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.distributed import World
from cifar_dist.fault_tolerance import signals
from cifar_dist.phase import Phase, in_phase

_VOTE = Phase("the start of the step before", waits=True)


class StopConsensus:
    """All-reduces the ranks' stop requests in the background while the next step is computed.

    The result is therefore one step late. The tensors are on the CPU, so nothing waits for a GPU. Waiting for the
    all-reduce of the step before keeps every rank within one step of the slowest.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def after_step(self) -> signal.Signals | None:
        """The signal because of which all ranks stop now; a collective, to be called after every step."""
        if self._world.size == 1:
            return signals.requested()
        agreed = self._result()
        if agreed is None:
            self._start()
        return agreed

    def after_last_step(self) -> signal.Signals | None:
        """The signal because of which all ranks stop before the final test; a collective, to be called once."""
        if self._world.size == 1:
            return signals.requested()
        self._result()
        self._start()
        return self._result()

    def _start(self) -> None:
        votes = torch.tensor(signals.requested() or 0)
        self._pending = (dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes)

    def _result(self) -> signal.Signals | None:
        if self._pending is None:
            return None
        work, votes = self._pending
        self._pending = None
        with in_phase(_VOTE):
            work.wait()
        return signal.Signals(int(votes)) if int(votes) else None
