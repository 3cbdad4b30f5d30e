"""Torchrun's agent, which starts the processes of a machine, made to start them again only where that can help.

Torch starts a failed group again whatever failed, so that a wrong setting is refused three times; and it starts all
again when a machine joins, for which they are stopped like by a person.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from cifar_dist.errors import EXIT_CODES, PeerError, StopError

# A lost process, and what may be the machine's fault as well as this program's. All else would only fail again.
_WORTH_ANOTHER_TRY = (PeerError.exit_code, 1)


def install() -> None:
    """Let torchrun work with this agent; it has no option for that."""
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]


class Agent(LocalElasticAgent):
    """Overrides the methods that torch means to be overridden."""

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        result: RunResult | None = super().run(role)
        if result is None:  # which torch itself does not expect
            print("the run ended without need of this machine, as NNODES were there already", file=sys.stderr)
            return RunResult(state=WorkerState.SUCCEEDED)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for path in Path(os.environ[EXIT_CODES]).iterdir():  # of the attempt before
            path.unlink()
        pids: dict[int, Any] = super()._start_workers(worker_group)
        context, timeout_s = self._pcontext, self._shutdown_timeout
        assert context is not None
        close = context.close
        # Torch itself calls it with half a minute, in which not all is saved and uploaded for sure.
        context.close = lambda death_sig=None, timeout=0: close(death_sig, timeout_s)  # type: ignore[method-assign]  # noqa: ARG005
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state not in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            return result
        exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        code = what_failed(exit_codes.values(), codes_left())
        if code == StopError.exit_code and worker_group.spec.rdzv_handler.num_nodes_waiting():
            # Stopped for a machine that joins: the agent there noticed first. This one is about to.
            return RunResult(state=WorkerState.HEALTHY)
        for rank, exit_code in exit_codes.items():
            if exit_code < 0:
                print(f"error: rank {rank} was killed by {signal.Signals(-exit_code).name}.", file=sys.stderr)
        if code not in _WORTH_ANOTHER_TRY:
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            number, most = worker_group.spec.max_restarts - self._remaining_restarts + 1, worker_group.spec.max_restarts
            print(f"starting again from the last checkpoint, restart {number} of {most}", file=sys.stderr)
        return result


def what_failed(failures: Iterable[int], left: set[int]) -> int:
    """The exit code that says most: of a failure of its own, then of a wish to stop, then of a lost process; else 0.

    Args:
        failures: of the workers that torchrun saw failing, the exit codes; -n: killed by signal n.
        left: the codes that workers left themselves, of which torchrun may have stopped some.
    """
    seen = [PeerError.exit_code if code < 0 else code for code in failures]
    # A worker that does not listen yet dies of torchrun's own SIGTERM.
    lost = any(code < 0 and code != -signal.SIGTERM for code in failures)
    peers = {0, PeerError.exit_code, StopError.exit_code}
    for own in ([code for code in seen if code not in peers], sorted(left - peers)):
        if own:
            return own[0]
    # A worker that is killed makes torchrun stop the others, and they say so.
    order = (PeerError, StopError) if lost else (StopError, PeerError)
    return next((kind.exit_code for kind in order if kind.exit_code in {*seen, *left}), 0)


def codes_left() -> set[int]:
    """The exit codes that the workers of this machine left behind."""
    return {int(text) for path in Path(os.environ[EXIT_CODES]).iterdir() if (text := path.read_text())}
