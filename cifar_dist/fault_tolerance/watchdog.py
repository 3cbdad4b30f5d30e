"""Ends a run that cannot continue: names a stalled rank, names a rank that was lost, sends an error to all ranks.

A thread on each rank checks whether the phase of its training thread changes (see `phase`). If it does not for
`run.stall_timeout_s`, the last heartbeats of all ranks tell for which rank the others wait. Seconds are counted by the
wake-ups of the watchdog, one each, so a suspended run or laptop is not a stalled one.
"""

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from cifar_dist.distributed import World
from cifar_dist.errors import KINDS, PeerError, StopError, UserError, begin_shutdown, shutting_down, write_exit_code
from cifar_dist.fault_tolerance import run_lock, status
from cifar_dist.fault_tolerance.heartbeat import INTERVAL_S, FailureNotice, Heartbeat, HeartbeatThread, identity
from cifar_dist.fault_tolerance.stall_report import describe_rank, first_few, stall_notice
from cifar_dist.phase import Phase, current

logger = logging.getLogger("cifar_dist")
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "ipdb", "IPython")
_LOST_PEER_ERRORS = (
    "by peer", "Timed out", "Broken pipe", "Connection refused", "remote process exited", "collective operation timeout"
)  # fmt: skip
_NOTIFY_S = 4.0  # for all ranks to receive a failure notice: some heartbeats
# For the training thread to end by itself after an error of another rank. Usually a failed collective raises one, but a
# thread that waits for a GPU, on which the collective never ends, does not notice.
_GRACE_S = 4.0  # after a failure notice
_LOST_GRACE_S = 2.0  # after a rank was lost, of which there is no notice
_SAVE_GRACE_S = 20.0  # in both cases, in phases that may take long, such as a save
_ANNOUNCE_S = 3.0
_EXIT_DELAY_S = 2.0  # between message and exit: torchrun kills all ranks once one has exited


class Watchdog(threading.Thread):
    """A context that watches the thread that creates it, and replaces an error about a lost connection.

    With a `timeout_s` of 0 it does not look for stalls. `directory` of the run is set once it is known.
    `connection_error` returns the error of a lost connection that the training thread may not notice. `announce` gets
    the name of each phase before the first step that takes longer than `_ANNOUNCE_S`.
    """

    def __init__(
        self,
        world: World,
        timeout_s: int,
        connection_error: Callable[[], RuntimeError | None] = lambda: None,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world, self.timeout_s = world, timeout_s
        self._connection_error, self._announce = connection_error, announce
        self._lost: list[int] = []
        self._replacing = threading.Lock()  # held by the thread that finds out why a connection was lost
        self.directory: Path | None = None
        self._training_thread = threading.get_ident()
        self._identity = identity()
        self._began = 0.0  # when the phase last seen began
        self._idle_s = 0.0  # how long it has been seen
        self._seen = dict.fromkeys(range(world.size), Heartbeat())  # the newest heartbeats, with `silent_s`
        self._closed = threading.Event()
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
            try:
                self.replace_lost_connection(error)
            except PeerError as lost:
                if self._heartbeats.notice is None:  # for ranks that do not notice
                    self._publish(FailureNotice("PeerError", str(lost)), limit_s=INTERVAL_S)
                raise
            notice = self._notice()
            if isinstance(error, UserError):
                if not error.printed_elsewhere:
                    error.printed_elsewhere = self._publish(FailureNotice(type(error).__name__, str(error)))
            elif notice is not None:
                # A consequence. Also a StopError: torchrun sends SIGTERM to all ranks as soon as one has failed.
                raise _error(notice) from error
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
        if not self._replacing.acquire(blocking=False):
            time.sleep(60)  # the other thread ends this process
        raise self._lost_peer_error(_reason(error)) from error

    def _lost_peer_error(self, detail: str) -> UserError:
        """Wait for heartbeats and a failure notice: the error of the notice, or one that names the lost ranks."""
        lost, notice = self._heartbeats.find_lost_ranks(), self._notice()
        self._lost = lost or []
        if notice is not None:
            return _error(notice)
        seen = self._heartbeats.seen
        names = first_few([f"rank {rank} on {seen[rank].host}" for rank in lost or ()]) or "another process"
        if lost is None:
            names = f"rank 0 or its machine ({os.environ.get('MASTER_ADDR')})"  # which holds the store
        return PeerError(
            f"{self.world.name} lost contact with {names}, which failed or was stopped: {detail}\n"
            f"Look for the first error above and in the run's logs/; then resume with --run.resume auto."
            + "".join(f"\nLast heartbeat of {describe_rank(rank, seen[rank])}" for rank in (lost or [])[:8]),
            printed_elsewhere=lost is not None and not self._is_reporter(lost),
        )

    def _is_reporter(self, lost: list[int]) -> bool:
        """Whether this rank prints that `lost` are lost: on its node rank 0 does, on another node the first rank."""
        if 0 not in lost and self._heartbeats.seen[0].host == self._identity.host:
            return self.world.is_main
        return self._heartbeats.is_first_to_report()

    def __enter__(self) -> Self:
        self._heartbeats.start()
        self.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None:
                self.replace_lost_connection(error)  # for errors outside `share_errors`
        finally:
            self._closed.set()
            self._heartbeats.close()

    def run(self) -> None:
        """Once a second: end this rank because of a failure notice, or check whether the run is stalled."""
        while not self._closed.wait(INTERVAL_S):
            began = current.began
            self._idle_s = self._idle_s + INTERVAL_S if began == self._began else 0.0
            self._began = began
            if current.step == 0 and self._idle_s - INTERVAL_S < _ANNOUNCE_S <= self._idle_s:
                self._announce(current.phase.name)
            for rank, heartbeat in self._heartbeats.seen.items():
                last = self._seen[rank]
                silent_s = last.silent_s + INTERVAL_S if heartbeat.number == last.number else 0.0
                self._seen[rank] = replace(heartbeat, silent_s=silent_s)
            notice = self._heartbeats.notice
            if notice is not None and (notice.abort or self._is_stuck(_GRACE_S)):
                self._abort(notice)
            elif notice is None and self._is_stuck(_LOST_GRACE_S) and (detail := self._lost_peer()):
                self._abort_without(detail)
            elif notice is None and 0 < self.timeout_s <= self._idle_s and not shutting_down():
                self._check()

    def _is_stuck(self, grace_s: float) -> bool:
        """Whether the training thread has not ended after an error of another rank within its grace."""
        grace_s = _SAVE_GRACE_S if current.phase.limit_s else grace_s
        return self._idle_s >= grace_s and not shutting_down() and not self._replacing.locked()

    def _lost_peer(self) -> str:
        """How a rank was lost without the training thread noticing; empty if none was."""
        error = self._connection_error()
        if error is not None:
            return _reason(error)
        return "its process has ended" if any(heartbeat.has_ended() for heartbeat in self._seen.values()) else ""

    def _abort_without(self, detail: str) -> None:
        """End this process because a rank was lost, and tell the others."""
        if self._replacing.acquire(blocking=False):
            error = self._lost_peer_error(detail)
            # Rank 0 prints what this rank does not, also if it learns of it by this notice.
            reporter = 0 if error.printed_elsewhere else self.world.rank
            notice = FailureNotice(type(error).__name__, str(error), reporter=reporter)
            self._heartbeats.publish(notice if error.printed_elsewhere else replace(notice, reporter=-1))
            self._abort(notice)

    def _check(self) -> None:
        """End the run if it is stalled."""
        own_rank = self.world.rank
        store_s = self._seen[own_rank].silent_s  # its own heartbeats come back unless the store does not answer
        notice = stall_notice(self._seen | {own_rank: self._heartbeat()}, self.timeout_s, store_s, own_rank)
        if notice is not None and store_s >= self.timeout_s:
            self._abort(notice)
        elif notice is not None:
            self._heartbeats.publish(notice)  # of several ranks' notices the first counts; the next interval reads it

    def _heartbeat(self) -> Heartbeat:
        phase, source = current.phase, ""
        if self.timeout_s and self._idle_s >= self.timeout_s / 4:
            stack = traceback.walk_stack(sys._current_frames()[self._training_thread])  # innermost first
            places = [(frame.f_globals.get("__name__", ""), line) for frame, line in stack]
            source = next((f"{module}:{line}" for module, line in places if module.startswith("cifar_dist.")), "")
            if any(module.split(".")[0] in _DEBUGGERS for module, _ in places):
                phase = Phase("in a debugger", limit_s=1e9)
        own = replace(self._identity, number=1, step=current.step)
        return replace(own, phase=phase, idle_s=self._idle_s, source=source)

    def _publish(self, notice: FailureNotice, limit_s: float = _NOTIFY_S) -> bool:
        """Whether rank 0 received it, so that it prints the message."""
        heartbeats, deadline = self._heartbeats, time.monotonic() + limit_s
        heartbeats.publish(notice)
        others = heartbeats.seen.keys() - set(self._lost)
        while time.monotonic() < deadline and not all(
            heartbeats.seen[rank].notified or heartbeats.seen[rank].finished for rank in others
        ):
            time.sleep(0.1)
        return heartbeats.notice == notice and heartbeats.seen[0].notified

    def _notice(self) -> FailureNotice | None:
        """The failure notice; during an abort, in which collectives fail, wait for `_abort` to end this process."""
        notice = self._heartbeats.notice
        if notice is not None and notice.abort:
            time.sleep(60)  # `_abort` takes _EXIT_DELAY_S and the time to write a file
        return notice

    def _abort(self, notice: FailureNotice) -> None:
        """End this process without waiting for its training thread, which may hang."""
        begin_shutdown()
        self._heartbeats.notice = replace(notice, abort=True)  # for `_notice`
        code, seen = _error(notice).exit_code, self._heartbeats.seen
        logger.error(notice.text)
        if notice.reporter == self.world.rank:
            print(f"\nerror: {notice.text}", file=sys.stderr, flush=True)
            owner = None if self.directory is None else run_lock.owner(self.directory)
            # While rank 0, which held the lock, was suspended, another run may have taken the directory over.
            if self.directory is not None and owner is not None and owner[:2] == (seen[0].pid, seen[0].host):
                with suppress(UserError):
                    status.write(self.directory, "failed", code, self.world.size, notice.text)
        write_exit_code(code)
        time.sleep(_EXIT_DELAY_S)
        for rank in notice.silent:
            seen[rank].kill()
        os._exit(code)


def _reason(error: BaseException) -> str:
    """The first line of an error of gloo or NCCL, without gloo's source location and its hints at the end."""
    return re.sub(r"\[/\S+\] ", "", (str(error).splitlines() or [""])[0]).split(". ")[0][:160]


def _error(notice: FailureNotice) -> UserError:
    kind = next((kind for kind in KINDS if kind.__name__ == notice.kind), PeerError)
    return kind(notice.text, printed_elsewhere=True)
