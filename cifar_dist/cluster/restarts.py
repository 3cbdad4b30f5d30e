"""torchrun's agent, which restarts the workers of a node only if that can help.

torchrun restarts after every failure, even after a wrong setting. When a node joins, it stops all workers by SIGTERM,
which looks like a user's stop.
"""

import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from cifar_dist.errors import EXIT_CODES, PeerError, StopError
from cifar_dist.process import SHUTDOWN_S

# A lost process, and errors that may come from the node. All others would happen again.
_RESTARTABLE = (PeerError.exit_code, 1)


class Agent(LocalElasticAgent):
    """Overrides methods that torch documents as extension points."""

    context: Any = None  # torch's, of the processes that were started last

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        result: RunResult | None = super().run(role)
        if result is None:  # torch itself does not expect it
            print("the run ended without this node: NNODES nodes had joined before", file=sys.stderr)
            return RunResult(state=WorkerState.SUCCEEDED)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for path in Path(os.environ[EXIT_CODES]).iterdir():  # of the previous start
            path.unlink()
        pids: dict[int, Any] = super()._start_workers(worker_group)
        context: Any = self._pcontext
        Agent.context = context
        close, timeout_s = context.close, int(os.environ[SHUTDOWN_S])
        # A patch: torch gives workers 30 s to save and upload here, whatever its option says; torch 2.11 has no option.
        context.close = lambda death_sig=None, timeout=0: close(death_sig, timeout_s)  # noqa: ARG005
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state not in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            return result
        exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        code = failure_code(exit_codes.values(), written_codes())
        if code == StopError.exit_code and worker_group.spec.rdzv_handler.num_nodes_waiting():
            # Another node's agent has stopped the workers because a node joins; this agent will notice that next.
            return RunResult(state=WorkerState.HEALTHY)
        for rank, exit_code in exit_codes.items():
            if exit_code < 0:
                print(f"error: rank {rank} was killed by {signal.Signals(-exit_code).name}.", file=sys.stderr)
        if code not in _RESTARTABLE:
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            most = worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            print(f"restarting from the last checkpoint, restart {number} of {most}", file=sys.stderr)
        return result


def failure_code(failures: Collection[int], written: set[int]) -> int:
    """The most informative exit code: of an error of its own, then of a requested stop, then of a lost process; else 0.

    Args:
        failures: exit codes of the workers that torchrun saw fail; -n: killed by signal n.
        written: codes that workers wrote themselves (errors.write_exit_code).
    """
    found = [PeerError.exit_code if code < 0 else code for code in failures] + sorted(written)
    # A worker without handlers yet dies of torchrun's own SIGTERM. After any other signal torchrun stops the other
    # workers, which then exit as stopped.
    lost = any(code < 0 and code != -signal.SIGTERM for code in failures)
    others = [kind.exit_code for kind in ((PeerError, StopError) if lost else (StopError, PeerError))]
    errors = [code for code in found if code not in (0, *others)]
    return next(iter([*errors, *(code for code in others if code in found)]), 0)


def num_killed() -> int:
    """How many workers were killed before they wrote an exit code: by torchrun, which waits only so long for them."""
    workers = () if Agent.context is None else Agent.context.subprocess_handlers.values()
    killed: int = sum(worker.proc.returncode == -signal.SIGKILL for worker in workers)
    return min(killed, len(workers) - len(list(Path(os.environ[EXIT_CODES]).iterdir())))


def written_codes() -> set[int]:
    """The exit codes that the workers of this node wrote."""
    return {int(text) for path in Path(os.environ[EXIT_CODES]).iterdir() if (text := path.read_text())}
