"""Says who holds a run up that stands still, and ends it; and makes the error of one rank known to all.

Each rank has a thread that sees whether its training thread moves on (`place`). If it does not for
`run.stall_timeout_s`, what all ranks said of themselves last (`beats`) tells which of them the others wait for. Time is
counted in the thread's own ticks: a run that was stopped as a whole, or a laptop that slept, has not stood still.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cifar_dist.distributed import World
from cifar_dist.errors import KINDS, PeerError, StopError, UserError, end, ending, leave_code, shared
from cifar_dist.place import here
from cifar_dist.training import status
from cifar_dist.training.beats import TICK_S, Beat, Exchange, Words, identity
from cifar_dist.training.standstill import at_fault, describe, store_holder, where

log = logging.getLogger("cifar_dist")
_PACKAGE = str(Path(__file__).parents[1])
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "ipdb", "IPython")
_HEAR_S = 4.0  # for all ranks to learn why the run ends
_GRACE_S = 20.0  # for the training thread to end by itself, once it is known why
_LEAVE_S = 2.0  # from the report to the end of the process: torchrun stops all as soon as one has ended


class Watch(threading.Thread):
    """Watches the thread that made it, beside those of the other ranks. With a `timeout_s` of 0 it only listens."""

    def __init__(self, world: World, timeout_s: int) -> None:
        super().__init__(name="stall", daemon=True)
        self.world, self.timeout_s = world, timeout_s
        self.directory: Path | None = None  # of the run, once it is known
        self._trains = threading.get_ident()
        self._who = identity()
        self._idle_s = 0.0
        self._silent_s = dict.fromkeys(range(world.size), 0.0)
        self._unanswered_s = 0.0  # since something went through the store
        self._closed, self._aborts = threading.Event(), threading.Event()
        self._exchange = Exchange(world.rank, world.size, self._beat) if world.size > 1 else None

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error that only one rank has becomes the error of all, instead of that they lost contact with it.

        Raises:
            UserError: that of another rank, if it said why it ends.
        """
        try:
            yield
        except PeerError as error:
            self._stay_if_over()
            words = self._hear()
            if words is None:
                gone = self._gone()
                if not gone:
                    raise
                raise PeerError(f"{error}\nNo longer there:\n{gone}") from error
            raise shared(_kind(words)(words.text)) from error
        except StopError as error:
            self._stay_if_over()
            words = None if self._exchange is None else self._exchange.words
            if words is None:
                raise
            # torchrun stops the others as soon as the rank that failed has ended.
            raise shared(_kind(words)(words.text)) from error
        except UserError as error:
            self._stay_if_over()
            if not error.shared:
                error.shared = self._tell(Words(type(error).__name__, str(error)))
            raise
        except Exception as error:
            self._stay_if_over()
            if self._exchange is not None and self._exchange.words is not None:
                words = self._exchange.words  # what follows from that is not always known as a PeerError
                raise shared(_kind(words)(words.text)) from error
            first = (str(error).splitlines() or [""])[0][:300]
            where = "Its traceback is in the output above and in the run's logs/."
            self._tell(Words("PeerError", f"rank {self.world.rank} failed: {type(error).__name__}: {first}\n{where}"))
            raise

    def start(self) -> None:
        if self._exchange is not None:
            self._exchange.start()
        super().start()

    def close(self) -> None:
        self._closed.set()
        if self._exchange is not None:
            self._exchange.close()

    def run(self) -> None:
        moves, numbers, rounds, before = -1, dict.fromkeys(self._silent_s, 0), 0, time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            # However long this thread was not run, it counts as no more than that it came late.
            passed, before = min(now - before, 2 * TICK_S), now
            self._idle_s = 0.0 if here.moves != moves else self._idle_s + passed
            moves = here.moves
            if self._exchange is None:
                self._judge({0: self._beat(1, False)})
                continue
            self._unanswered_s = 0.0 if self._exchange.rounds != rounds else self._unanswered_s + passed
            rounds = self._exchange.rounds
            seen = dict(self._exchange.seen)
            for rank, beat in seen.items():
                self._silent_s[rank] = 0.0 if beat.number != numbers[rank] else self._silent_s[rank] + passed
                numbers[rank] = beat.number
            words = self._exchange.words
            # The error of another rank ends this one by a collective that fails; not every one does.
            if words is not None and (words.abort or (self._idle_s >= _GRACE_S and not ending())):
                self._abort(words)
            self._judge(seen | {self.world.rank: self._beat(1, False)})

    def _judge(self, seen: dict[int, Beat]) -> None:
        said = self._exchange is not None and self._exchange.words is not None
        if not self.timeout_s or self._idle_s < self.timeout_s or said or ending():
            return
        silent_s = self._silent_s | {self.world.rank: 0.0}
        store_s = self._unanswered_s
        if self._exchange is not None and store_s >= self.timeout_s:
            # Nothing is known of the others since; the one to blame is who holds the store.
            silent_s = silent_s | {rank: max(0.0, s - store_s) for rank, s in silent_s.items()}
            holder = store_holder()
            if holder is not None and holder != self.world.rank:
                silent_s[holder] = store_s
            here_too = [r for r, beat in seen.items() if beat.process_state() not in ("", "T", "t", "Z", "X")]
            speaker = min([self.world.rank, *here_too])
            faulty = at_fault(seen, silent_s, self.timeout_s) or []
            text = describe(seen, silent_s, faulty, self.timeout_s, store_s)
            self._abort(Words("PeerError", text, True, speaker, _silent(silent_s, self.timeout_s)))
        found = at_fault(seen, silent_s, self.timeout_s)
        if found is None:
            return
        silent = _silent(silent_s, self.timeout_s)
        speaker = min(set(seen) - set(silent))
        words = Words("PeerError", describe(seen, silent_s, found, self.timeout_s), True, speaker, silent)
        if self._exchange is None:
            self._abort(words)
        else:
            self._exchange.say(words)  # and the next tick hears which of the ranks' reports it is

    def _beat(self, number: int, left: bool) -> Beat:
        place, source = here.place, ""
        limit_s = place.limit_s
        if self.timeout_s and self._idle_s >= self.timeout_s / 4:
            frame = sys._current_frames().get(self._trains)
            source, debugged = _source(frame), _is_debugged(frame)
            if debugged:
                place, limit_s = place._replace(what="in a debugger", waits=False), 1e9
        heard = self._exchange is not None and self._exchange.words is not None
        return Beat(
            number, here.step, place.what, place.waits, limit_s, self._idle_s, source, left, heard, **self._who
        )  # fmt: skip

    def _tell(self, words: Words) -> bool:
        """Whether rank 0 knows, so that it will say so."""
        exchange = self._exchange
        if exchange is None:
            return False
        exchange.say(words)
        deadline = time.monotonic() + _HEAR_S
        while time.monotonic() < deadline and not all(beat.heard or beat.left for beat in exchange.seen.values()):
            time.sleep(0.1)
        return exchange.words == words and exchange.seen[0].heard

    def _hear(self) -> Words | None:
        exchange = self._exchange
        deadline = time.monotonic() + 2 * TICK_S
        while exchange is not None and exchange.words is None and exchange.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._stay_if_over()
        return None if exchange is None else exchange.words

    def _gone(self) -> str:
        """The other ranks on this machine that ended without a word, as lines."""
        seen = {} if self._exchange is None else self._exchange.seen
        machine = self._who["machine"]
        mine = {rank: beat for rank, beat in seen.items() if machine and beat.machine == machine and not beat.left}
        gone = [rank for rank, beat in mine.items() if beat.process_state() in ("", "Z", "X")]
        return "\n".join(f"  {where(rank, mine[rank])}" for rank in gone[:8])

    def _stay_if_over(self) -> None:
        """The run's end by `_abort` makes collectives fail; they have nothing to say."""
        words = None if self._exchange is None else self._exchange.words
        if self._aborts.is_set() or (words is not None and words.abort):
            time.sleep(60)

    def _abort(self, words: Words) -> None:
        """End this process, whose training thread may be anywhere; so nothing is waited for."""
        end()
        self._aborts.set()
        code = _kind(words).exit_code
        log.error(words.text)
        if words.speaker == self.world.rank:
            print(f"\nerror: {words.text}", file=sys.stderr, flush=True)
            if self.directory is not None:
                with suppress(UserError):
                    status.write(self.directory, "failed", code, words.text)
        leave_code(code)
        time.sleep(_LEAVE_S)
        if self._exchange is not None:
            for rank in words.silent:
                self._exchange.seen[rank].kill()
        os._exit(code)


@contextmanager
def watched(world: World, timeout_s: int) -> Iterator[Watch]:
    """Watch the calling thread inside."""
    watch = Watch(world, timeout_s)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()


def _kind(words: Words) -> type[UserError]:
    return next((kind for kind in KINDS if kind.__name__ == words.kind), PeerError)


def _silent(silent_s: dict[int, float], timeout_s: int) -> tuple[int, ...]:
    return tuple(rank for rank, seconds in silent_s.items() if seconds >= timeout_s)


def _source(frame: FrameType | None) -> str:
    """The innermost line of this package in the stack of `frame`."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{path.removeprefix(_PACKAGE + os.sep)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _is_debugged(frame: FrameType | None) -> bool:
    """Whether a person is at work in a debugger there."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
