"""Detects a stalled run, names the rank that stalls it, and ends it. Also makes the error of one rank known to all.

A thread on each rank checks whether the phase of its training thread changes (see `phase`). If it does not for
`run.stall_timeout_s`, the last heartbeats of all ranks tell for which rank the others wait. Time counts in intervals
of that thread, so a suspended run or laptop is not a stalled one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cifar_dist.distributed import World
from cifar_dist.errors import KINDS, PeerError, StopError, UserError, begin_shutdown, shutting_down, write_exit_code
from cifar_dist.fault_tolerance import status
from cifar_dist.fault_tolerance.heartbeat import INTERVAL_S, FailureNotice, Heartbeat, HeartbeatThread, identity
from cifar_dist.fault_tolerance.stall_report import describe, describe_rank, find_stalled_ranks, store_host_rank
from cifar_dist.phase import current

logger = logging.getLogger("cifar_dist")
_PACKAGE = str(Path(__file__).parents[1])
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "ipdb", "IPython")
_NOTIFY_S = 4.0  # for all ranks to receive a failure notice
_GRACE_S = 20.0  # for the training thread to end by itself after a notice
_EXIT_DELAY_S = 2.0  # between message and exit: torchrun kills all ranks once one has exited


class Watchdog(threading.Thread):
    """Watches the thread that creates it. With a `timeout_s` of 0 it only exchanges failure notices.

    `directory` of the run is set once it is known.
    """

    def __init__(self, world: World, timeout_s: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world, self.timeout_s = world, timeout_s
        self.directory: Path | None = None
        self._training_thread = threading.get_ident()
        self._identity = identity()
        self._idle_s = 0.0
        self._silent_s = dict.fromkeys(range(world.size), 0.0)
        self._store_s = 0.0  # since the store last answered
        self._closed, self._aborting = threading.Event(), threading.Event()
        self._heartbeats = HeartbeatThread(world.rank, world.size, self._heartbeat) if world.size > 1 else None

    @property
    def _notice(self) -> FailureNotice | None:
        return None if self._heartbeats is None else self._heartbeats.notice

    @contextmanager
    def share_errors(self) -> Iterator[None]:
        """Publish an error of this rank to all ranks; replace a lost connection by the error that caused it.

        Raises:
            UserError: of another rank that published why it ends.
        """
        try:
            yield
        except PeerError as error:
            notice = self._wait_for_notice()
            if notice is not None:
                raise _error(notice) from error
            dead = self._dead_ranks()
            if not dead:
                raise
            raise PeerError(f"{error}\nNo longer running:\n{dead}") from error
        except StopError as error:
            self._wait_if_aborting()
            # torchrun sends SIGTERM to all ranks as soon as one has failed.
            if self._notice is None:
                raise
            raise _error(self._notice) from error
        except UserError as error:
            self._wait_if_aborting()
            if not error.on_all_ranks:
                error.on_all_ranks = self._publish(FailureNotice(type(error).__name__, str(error)))
            raise
        except Exception as error:
            self._wait_if_aborting()
            if self._notice is not None:
                raise _error(self._notice) from error  # probably its consequence
            first = (str(error).splitlines() or [""])[0][:300]
            where = "Its traceback is in the output above and in the run's logs/."
            text = f"rank {self.world.rank} failed: {type(error).__name__}: {first}\n{where}"
            self._publish(FailureNotice("PeerError", text))
            raise

    def start(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.start()
        super().start()

    def close(self) -> None:
        self._closed.set()
        if self._heartbeats is not None:
            self._heartbeats.close()

    def run(self) -> None:
        changes, numbers, rounds, before = -1, dict.fromkeys(self._silent_s, 0), 0, time.monotonic()
        while not self._closed.wait(INTERVAL_S):
            now = time.monotonic()
            # At most two intervals, however long this thread was suspended.
            passed, before = min(now - before, 2 * INTERVAL_S), now
            self._idle_s = 0.0 if current.changes != changes else self._idle_s + passed
            changes = current.changes
            if self._heartbeats is None:
                self._check({0: self._heartbeat(1, False)})
                continue
            self._store_s = 0.0 if self._heartbeats.rounds != rounds else self._store_s + passed
            rounds = self._heartbeats.rounds
            seen = dict(self._heartbeats.seen)
            for rank, heartbeat in seen.items():
                self._silent_s[rank] = 0.0 if heartbeat.number != numbers[rank] else self._silent_s[rank] + passed
                numbers[rank] = heartbeat.number
            notice = self._heartbeats.notice
            # The error of another rank usually ends this one by a failed collective, but not always.
            if notice is not None and (notice.abort or (self._idle_s >= _GRACE_S and not shutting_down())):
                self._abort(notice)
            self._check(seen | {self.world.rank: self._heartbeat(1, False)})

    def _check(self, seen: dict[int, Heartbeat]) -> None:
        """End the run if it is stalled."""
        if not self.timeout_s or self._idle_s < self.timeout_s or self._notice is not None or shutting_down():
            return
        silent_s = self._silent_s | {self.world.rank: 0.0}
        if self._heartbeats is not None and self._store_s >= self.timeout_s:
            self._abort(self._store_notice(seen, silent_s))
        stalled = find_stalled_ranks(seen, silent_s, self.timeout_s)
        if stalled is None:
            return
        silent = self._silent(silent_s)
        text = describe(seen, silent_s, stalled, self.timeout_s)
        notice = FailureNotice("PeerError", text, True, min(set(seen) - set(silent)), silent)
        if self._heartbeats is None:
            self._abort(notice)
        else:
            self._heartbeats.publish(notice)  # of several ranks' notices the first counts; the next interval reads it

    def _store_notice(self, seen: Mapping[int, Heartbeat], silent_s: dict[int, float]) -> FailureNotice:
        """The notice when the store does not answer. All heartbeats are old then; its host is the stalled rank."""
        silent_s = {rank: max(0.0, seconds - self._store_s) for rank, seconds in silent_s.items()}
        host = store_host_rank()
        if host is not None and host != self.world.rank:
            silent_s[host] = self._store_s
        # Notices cannot be exchanged, so the lowest rank that runs on this node prints.
        reporter = min([self.world.rank, *(rank for rank, heartbeat in seen.items() if heartbeat.is_running())])
        stalled = find_stalled_ranks(seen, silent_s, self.timeout_s) or []
        text = describe(seen, silent_s, stalled, self.timeout_s, self._store_s)
        return FailureNotice("PeerError", text, True, reporter, self._silent(silent_s))

    def _silent(self, silent_s: Mapping[int, float]) -> tuple[int, ...]:
        return tuple(rank for rank, seconds in silent_s.items() if seconds >= self.timeout_s)

    def _heartbeat(self, number: int, finished: bool) -> Heartbeat:
        phase, limit_s, waits, source = current.phase.name, current.phase.limit_s, current.phase.waits, ""
        if self.timeout_s and self._idle_s >= self.timeout_s / 4:
            frame = sys._current_frames().get(self._training_thread)
            source = _source_line(frame)
            if _in_debugger(frame):
                phase, limit_s, waits = "in a debugger", 1e9, False
        return Heartbeat(
            number, current.step, phase, waits, limit_s, self._idle_s, source, finished, self._notice is not None,
            **self._identity,
        )  # fmt: skip

    def _publish(self, notice: FailureNotice) -> bool:
        """Whether rank 0 received it, so that it prints the message."""
        heartbeats = self._heartbeats
        if heartbeats is None:
            return False
        heartbeats.publish(notice)
        deadline = time.monotonic() + _NOTIFY_S
        while time.monotonic() < deadline and not all(h.notified or h.finished for h in heartbeats.seen.values()):
            time.sleep(0.1)
        return heartbeats.notice == notice and heartbeats.seen[0].notified

    def _wait_for_notice(self) -> FailureNotice | None:
        """The failure notice, if one arrives within two intervals."""
        self._wait_if_aborting()
        heartbeats, deadline = self._heartbeats, time.monotonic() + 2 * INTERVAL_S
        while heartbeats is not None and heartbeats.is_alive() and time.monotonic() < deadline:
            if heartbeats.notice is not None:
                break
            time.sleep(0.1)
        self._wait_if_aborting()
        return self._notice

    def _dead_ranks(self) -> str:
        """Lines about ranks on this node that ended without a notice."""
        seen = {} if self._heartbeats is None else self._heartbeats.seen
        dead = [rank for rank, heartbeat in seen.items() if not heartbeat.finished and heartbeat.has_ended()]
        return "\n".join(f"  {describe_rank(rank, seen[rank])}" for rank in dead[:8])

    def _wait_if_aborting(self) -> None:
        """Wait for `_abort` to end this process: collectives fail during an abort, and that is not the reason."""
        if self._aborting.is_set() or (self._notice is not None and self._notice.abort):
            time.sleep(60)

    def _abort(self, notice: FailureNotice) -> None:
        """End this process without waiting for its training thread, which may hang."""
        begin_shutdown()
        self._aborting.set()
        code = _error(notice).exit_code
        logger.error(notice.text)
        if notice.reporter == self.world.rank:
            print(f"\nerror: {notice.text}", file=sys.stderr, flush=True)
            if self.directory is not None:
                with suppress(UserError):
                    status.write(self.directory, "failed", code, notice.text)
        write_exit_code(code)
        time.sleep(_EXIT_DELAY_S)
        if self._heartbeats is not None:
            for rank in notice.silent:
                self._heartbeats.seen[rank].kill()
        os._exit(code)


@contextmanager
def watchdog(world: World, timeout_s: int) -> Iterator[Watchdog]:
    """Watch the calling thread inside."""
    thread = Watchdog(world, timeout_s)
    thread.start()
    try:
        yield thread
    finally:
        thread.close()


def _error(notice: FailureNotice) -> UserError:
    kind = next((kind for kind in KINDS if kind.__name__ == notice.kind), PeerError)
    return kind(notice.text, on_all_ranks=True)


def _source_line(frame: FrameType | None) -> str:
    """The innermost line of this package on the stack."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{path.removeprefix(_PACKAGE + os.sep)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _in_debugger(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
