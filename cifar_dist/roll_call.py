"""Which process was lost: asked of all, by way of torch's store, once a collective has failed.

What fails says only that some connection broke, which is often that to a process that ends because of another.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_LOOK_S, _WAIT_S = 1.0, 3.0


class RollCall:
    """On every rank: answers when another one calls. Costs one small question to the store per second, in a thread.

    Args:
        store: that of the process group.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = PrefixStore("roll_call", store), rank, size
        self._over = threading.Event()
        self._store.set(f"host/{rank}", socket.gethostname())
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def missing(self) -> list[str] | None:
        """The ranks that do not answer, as "rank 3 on node-b"; None when the store is gone itself. Takes 3 s."""
        try:
            self._store.set("called", "")
            absent = set(range(self._size)) - {self._rank}
            deadline = time.monotonic() + _WAIT_S
            while absent and time.monotonic() < deadline:
                absent -= {rank for rank in absent if self._store.check([f"here/{rank}"])}
                time.sleep(_LOOK_S / 10)
            return [f"rank {rank} on {self._store.get(f'host/{rank}').decode()}" for rank in sorted(absent)]
        except RuntimeError:
            return None

    def speaks(self) -> bool:
        """Whether this process is the first of its machine to ask, and so the one to say what happened."""
        try:
            return int(self._store.compare_set(f"speaker/{socket.gethostname()}", "", str(self._rank))) == self._rank
        except RuntimeError:
            return True

    def close(self) -> None:
        self._over.set()
        self._thread.join(_LOOK_S)  # not for ever, should the store be that of a process that stands still

    def _answer(self) -> None:
        with suppress(RuntimeError):  # without a store there is nobody to answer
            while not self._over.wait(_LOOK_S):
                if self._store.check(["called"]):
                    self._store.set(f"here/{self._rank}", "")
                    return
