"""After a failed collective: find out through the store which ranks are gone.

The error of gloo or NCCL names only the connection that broke. That is often one to a rank that exits because of
another rank, so all ranks are asked which of them are alive.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from cifar_dist.distributed import World
from cifar_dist.errors import PeerError

_POLL_S, _WAIT_S = 1.0, 3.0
_LOST_PEER_ERRORS = (
    "by peer", "Timed out", "Broken pipe", "Connection refused", "remote process exited", "collective operation timeout"
)  # fmt: skip


class RollCall:
    """Answers, in a thread of every rank, when a rank asks who is alive. Costs one store query per second."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = PrefixStore("roll_call", store), rank, size
        self._closed = threading.Event()
        self._store.set(f"host/{rank}", socket.gethostname())
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def dead_ranks(self) -> list[str] | None:
        """The ranks that do not answer within 3 s, as "rank 3 on node-b"; None if the store does not answer."""
        try:
            self._store.set("called", "")
            absent = set(range(self._size)) - {self._rank}
            deadline = time.monotonic() + _WAIT_S
            while absent and time.monotonic() < deadline:
                absent -= {rank for rank in absent if self._store.check([f"here/{rank}"])}
                time.sleep(_POLL_S / 10)
            return [f"rank {rank} on {self._store.get(f'host/{rank}').decode()}" for rank in sorted(absent)]
        except RuntimeError:
            return None

    def is_first_to_report(self) -> bool:
        """Whether this is the first rank of its node to ask; only that one prints the error."""
        try:
            return int(self._store.compare_set(f"speaker/{socket.gethostname()}", "", str(self._rank))) == self._rank
        except RuntimeError:
            return True

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_POLL_S)  # not longer: the process that holds the store may be suspended

    def _answer(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._closed.wait(_POLL_S):
                if self._store.check(["called"]):
                    self._store.set(f"here/{self._rank}", "")
                    return


@contextmanager
def report_lost_peers(world: World) -> Iterator[RollCall | None]:
    """Inside, answer other ranks and convert errors like `convert_peer_errors`. Yields None for a single process."""
    if world.store is None:
        yield None
        return
    roll_call = RollCall(world.store, world.rank, world.size)
    try:
        with convert_peer_errors(world, roll_call):
            yield roll_call
    finally:
        roll_call.close()


@contextmanager
def convert_peer_errors(world: World, roll_call: RollCall | None) -> Iterator[None]:
    """Turn the errors that gloo and NCCL raise when a peer is gone into a PeerError.

    Raises:
        PeerError: it names the ranks that are gone.
    """
    try:
        yield
    except RuntimeError as error:
        if roll_call is not None and any(text in str(error) for text in _LOST_PEER_ERRORS):
            raise _peer_error(world, roll_call, error) from error
        raise


def _peer_error(world: World, roll_call: RollCall, error: RuntimeError) -> PeerError:
    dead = roll_call.dead_ranks()
    if dead is None:
        lost = f"rank 0 or its machine ({os.environ.get('MASTER_ADDR')})"  # which holds the store
    else:
        lost = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    # Without gloo's source location and its hints at the end.
    detail = re.sub(r"\[/\S+\] ", "", (str(error).splitlines() or [""])[0]).split(". ")[0][:160]
    return PeerError(
        f"{world.name} lost contact with {lost or 'another process'}, which failed or was stopped: {detail}\n"
        f"Look for the first error above and in the run's logs/; then resume with --run.resume auto.",
        on_all_ranks=not roll_call.is_first_to_report(),
    )
