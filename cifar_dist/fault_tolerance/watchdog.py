"""Detects a stalled run, names the rank that stalls it, and ends it. Also makes the error of one rank known to all.

A thread on each rank checks whether the phase of its training thread changes (see `phase`). If it does not for
`run.stall_timeout_s`, the last heartbeats of all ranks tell for which rank the others wait. Each wake-up of the
watchdog counts as two seconds at most, so a suspended run or laptop is not a stalled one.
"""

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cifar_dist.distributed import World
from cifar_dist.errors import KINDS, PeerError, StopError, UserError, begin_shutdown, shutting_down, write_exit_code
from cifar_dist.fault_tolerance import run_lock, status
from cifar_dist.fault_tolerance.heartbeat import INTERVAL_S, FailureNotice, Heartbeat, HeartbeatThread, identity
from cifar_dist.fault_tolerance.stall_report import describe_rank, first_few, stall_notice, store_host_rank
from cifar_dist.phase import Phase, current

logger = logging.getLogger("cifar_dist")
_PACKAGE = Path(__file__).parents[1]
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "ipdb", "IPython")
_IN_DEBUGGER = Phase("in a debugger", limit_s=1e9)
_LOST_PEER_ERRORS = (
    "by peer", "Timed out", "Broken pipe", "Connection refused", "remote process exited", "collective operation timeout"
)  # fmt: skip
_NOTIFY_S = 4.0  # for all ranks to receive a failure notice
_GRACE_S = 20.0  # for the training thread to end by itself after a notice
_EXIT_DELAY_S = 2.0  # between message and exit: torchrun kills all ranks once one has exited


@dataclass
class _Unchanged:
    """Counts the seconds since a number last changed."""

    number: int = 0
    seconds: float = 0.0

    def update(self, number: int, passed_s: float) -> None:
        self.seconds = self.seconds + passed_s if number == self.number else 0.0
        self.number = number


class Watchdog(threading.Thread):
    """A context that watches the thread that creates it, and replaces an error about a lost connection.

    With a `timeout_s` of 0 it does not look for stalls. `directory` of the run is set once it is known.
    """

    def __init__(self, world: World, timeout_s: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world, self.timeout_s = world, timeout_s
        self.directory: Path | None = None
        self._training_thread = threading.get_ident()
        self._identity = identity()
        self._phase, self._store = _Unchanged(), _Unchanged()
        self._ranks = [_Unchanged() for _ in range(world.size)]
        self._closed, self._aborting = threading.Event(), threading.Event()
        self._heartbeats = HeartbeatThread(world, self._heartbeat)

    @contextmanager
    def share_errors(self) -> Iterator[None]:
        """Publish an error of this rank to all ranks; replace a lost connection by the error that caused it.

        Raises:
            UserError: of another rank that published why it ends; or see `replace_lost_connection`.
        """
        try:
            yield
        except (StopError, Exception) as error:
            self.replace_lost_connection(error)
            self._wait_if_aborting()
            if isinstance(error, UserError):
                if not error.on_all_ranks:
                    error.on_all_ranks = self._publish(FailureNotice(type(error).__name__, str(error)))
            elif self._heartbeats.notice is not None:
                # A consequence. Also a StopError: torchrun sends SIGTERM to all ranks as soon as one has failed.
                raise _error(self._heartbeats.notice) from error
            elif not isinstance(error, StopError):
                first = (str(error).splitlines() or [""])[0][:300]
                where = "Its traceback is in the output above and in the run's logs/."
                text = f"rank {self.world.rank} failed: {type(error).__name__}: {first}\n{where}"
                self._publish(FailureNotice("PeerError", text))
            raise

    def replace_lost_connection(self, error: BaseException) -> None:
        """Do nothing unless `error` is one that gloo or NCCL raises when a peer is gone.

        It names only the connection that broke. That is often one to a rank that exits because of another rank.

        Raises:
            UserError: of another rank that published why it ends.
            PeerError: it names the ranks that send no heartbeats.
        """
        known = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER_ERRORS)
        if not known or self.world.size == 1:
            return
        lost = self._heartbeats.find_lost_ranks()
        self._wait_if_aborting()
        if self._heartbeats.notice is not None:
            raise _error(self._heartbeats.notice) from error
        seen = self._heartbeats.seen
        names = first_few([f"rank {rank} on {seen[rank].host}" for rank in lost or ()]) or "another process"
        if lost is None:
            names = f"rank 0 or its machine ({os.environ.get('MASTER_ADDR')})"  # which holds the store
        # Without gloo's source location and its hints at the end.
        detail = re.sub(r"\[/\S+\] ", "", (str(error).splitlines() or [""])[0]).split(". ")[0][:160]
        raise PeerError(
            f"{self.world.name} lost contact with {names}, which failed or was stopped: {detail}\n"
            f"Look for the first error above and in the run's logs/; then resume with --run.resume auto."
            + "".join(f"\nLast heartbeat of {describe_rank(rank, seen[rank])}" for rank in (lost or [])[:8]),
            on_all_ranks=lost is not None and not self._heartbeats.is_first_to_report(),
        ) from error

    def __enter__(self) -> Self:
        self._heartbeats.start()
        self.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None:
                self.replace_lost_connection(error)
        finally:
            self._closed.set()
            self._heartbeats.close()

    def run(self) -> None:
        """Once a second: end this rank because of a failure notice, or check whether the run is stalled."""
        heartbeats, before = self._heartbeats, time.monotonic()
        while not self._closed.wait(INTERVAL_S):
            now = time.monotonic()
            # At most two intervals, however long this thread was suspended.
            passed_s, before = min(now - before, 2 * INTERVAL_S), now
            self._phase.update(current.changes, passed_s)
            self._store.update(heartbeats.rounds, passed_s)
            for rank, heartbeat in heartbeats.seen.items():
                self._ranks[rank].update(heartbeat.number, passed_s)
            notice = heartbeats.notice
            # The error of another rank usually ends this one by a failed collective, but not always.
            if notice is not None and (notice.abort or (self._phase.seconds >= _GRACE_S and not shutting_down())):
                self._abort(notice)
            elif notice is None and 0 < self.timeout_s <= self._phase.seconds and not shutting_down():
                self._check()

    def _check(self) -> None:
        """End the run if it is stalled."""
        store_s, host = self._store.seconds, store_host_rank()
        # No heartbeat arrives while the store does not answer; only the rank that hosts it is to blame for that.
        silent_s = [max(0.0, rank.seconds - store_s) for rank in self._ranks]
        if host is not None and store_s >= self.timeout_s:
            silent_s[host] = store_s
        seen = {rank: replace(beat, silent_s=silent_s[rank]) for rank, beat in self._heartbeats.seen.items()}
        seen[self.world.rank] = self._heartbeat()
        notice = stall_notice(seen, self.timeout_s, store_s, self.world.rank)
        if notice is not None and store_s >= self.timeout_s:
            self._abort(notice)
        elif notice is not None:
            self._heartbeats.publish(notice)  # of several ranks' notices the first counts; the next interval reads it

    def _heartbeat(self) -> Heartbeat:
        phase, source = current.phase, ""
        if self.timeout_s and self._phase.seconds >= self.timeout_s / 4:
            stack = list(traceback.walk_stack(sys._current_frames()[self._training_thread]))  # innermost first
            places = ((Path(frame.f_code.co_filename), line) for frame, line in stack)
            own = (f"{path.relative_to(_PACKAGE)}:{line}" for path, line in places if path.is_relative_to(_PACKAGE))
            source = next(own, "")
            if any(frame.f_globals.get("__name__", "").split(".")[0] in _DEBUGGERS for frame, _ in stack):
                phase = _IN_DEBUGGER
        return replace(
            self._identity, number=1, step=current.step, phase=phase.name, waits=phase.waits, limit_s=phase.limit_s,
            idle_s=self._phase.seconds, source=source,
        )  # fmt: skip

    def _publish(self, notice: FailureNotice) -> bool:
        """Whether rank 0 received it, so that it prints the message."""
        heartbeats, deadline = self._heartbeats, time.monotonic() + _NOTIFY_S
        heartbeats.publish(notice)
        while time.monotonic() < deadline and not all(h.notified or h.finished for h in heartbeats.seen.values()):
            time.sleep(0.1)
        return heartbeats.notice == notice and heartbeats.seen[0].notified

    def _wait_if_aborting(self) -> None:
        """Wait for `_abort` to end this process: collectives fail during an abort, and that is not the reason."""
        notice = self._heartbeats.notice
        if self._aborting.is_set() or (notice is not None and notice.abort):
            time.sleep(60)  # longer than `_abort` takes

    def _abort(self, notice: FailureNotice) -> None:
        """End this process without waiting for its training thread, which may hang."""
        begin_shutdown()
        self._aborting.set()
        code, seen = _error(notice).exit_code, self._heartbeats.seen
        logger.error(notice.text)
        if notice.reporter == self.world.rank:
            print(f"\nerror: {notice.text}", file=sys.stderr, flush=True)
            owner = None if self.directory is None else run_lock.owner(self.directory)
            # While rank 0, which held the lock, was suspended, another run may have taken the directory over.
            if self.directory is not None and owner is not None and owner[:2] == (seen[0].pid, seen[0].host):
                with suppress(UserError):
                    status.write(self.directory, "failed", code, notice.text)
        write_exit_code(code)
        time.sleep(_EXIT_DELAY_S)
        for rank in notice.silent:
            seen[rank].kill()
        os._exit(code)


def _error(notice: FailureNotice) -> UserError:
    kind = next((kind for kind in KINDS if kind.__name__ == notice.kind), PeerError)
    return kind(notice.text, on_all_ranks=True)
