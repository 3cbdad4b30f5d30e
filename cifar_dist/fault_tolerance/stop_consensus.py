"""All ranks stop after the same step, although a signal reaches each rank at another moment, or only one rank."""

from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.distributed import World
from cifar_dist.fault_tolerance import signals
from cifar_dist.phase import Phase, in_phase

_WAIT = Phase("the exchange of stop requests", waits=True)


class StopConsensus:
    """All-reduces the ranks' stop requests in the background while the next step is computed.

    The result is therefore one step late. The tensors are on the CPU, so nothing waits for a GPU. Waiting for the
    all-reduce of the step before keeps every rank within one step of the slowest, and fails if a rank is lost.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def agreed_signal(self, last_step: bool) -> Signals | None:
        """The signal because of which all ranks stop now; a collective, to be called after every step.

        Once more with `last_step` before the final test; then the result is not late.
        """
        if self._world.size == 1:
            return signals.requested()
        number = self._result()
        if last_step or not number:
            requests = torch.tensor(signals.requested() or 0)
            self._pending = (dist.all_reduce(requests, dist.ReduceOp.MAX, async_op=True), requests)
        if last_step:
            number = self._result()
        return Signals(number) if number else None

    def connection_error(self) -> RuntimeError | None:
        """The error of a pending all-reduce that has failed because a rank is gone. Does not wait; for any thread."""
        pending = self._pending
        if pending is not None and pending[0].is_completed():
            try:
                pending[0].wait()
            except RuntimeError as error:
                return error
        return None

    def _result(self) -> int:
        """The highest signal number that a rank sent, 0 without one."""
        if self._pending is None:
            return 0
        (work, requests), self._pending = self._pending, None
        with in_phase(_WAIT):
            work.wait()
        return int(requests)
