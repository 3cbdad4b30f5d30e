"""All ranks stop after the same step, though a signal reaches each at another moment, or only one."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist import stopping
from cifar_dist.distributed import World
from cifar_dist.place import Place, at

_VOTE = Place("the start of the step before", waits=True)


class StopVote:
    """The ranks' wishes to stop, added up in the background while the next step is computed.

    So the answer is one step late. The votes are on the CPU and never wait for a GPU; for other ranks they wait until
    these have started the step before, so that no process runs ahead of the others by more than that.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def after_step(self) -> signal.Signals | None:
        """Call after every step, on every rank: the signal by which all are to stop now."""
        if self._world.size == 1:
            return stopping.wish()
        agreed = self._result()
        if agreed is None:
            self._start()
        return agreed

    def after_last(self) -> signal.Signals | None:
        """Call once after the last step, on every rank: the signal by which all are to stop before the final test."""
        if self._world.size == 1:
            return stopping.wish()
        self._result()
        self._start()
        return self._result()

    def _start(self) -> None:
        votes = torch.tensor(stopping.wish() or 0)
        self._pending = (dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes)

    def _result(self) -> signal.Signals | None:
        if self._pending is None:
            return None
        work, votes = self._pending
        self._pending = None
        with at(_VOTE):
            work.wait()
        return signal.Signals(int(votes)) if int(votes) else None
