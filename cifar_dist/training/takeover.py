"""Become the owner of a run directory: wait for its owner, ask it to go, or take over what it left without a word.

The kernel's lock on .lock comes first; it ends with the process that held it, but on some network file systems it
holds on one machine only, or not at all. So .owner decides. An owner is taken to be gone when its process has ended
on this very machine, or when it is of another machine and its heart does not beat while it is watched for `WATCH_S`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from cifar_dist.errors import RunInUseError
from cifar_dist.files import write_text_atomic
from cifar_dist.training.claim import BEAT_S, REQUEST, Claim
from cifar_dist.training.owner import Owner, contents_of

LOCK = ".lock"
WATCH_S = 20.0
"""Ten beats: a file server may keep a write to itself for some seconds."""
TAKEOVER_WAIT_S = 120.0  # longer than LEAVE_S and WATCH_S together, and than a file server keeps a dead client's locks
ORPHAN_WAIT_S = 30.0  # longer than `stopping` gives the workers of a dead launcher
_MOMENT_S, _POLL_S, _SAY_S = 2.0, 0.5, 15.0


class _Watch:
    """What a starter sees of the owner before it, and how long it waits for it."""

    def __init__(self, directory: Path, me: Owner, patient: bool, say: Callable[[str], None]) -> None:
        self.directory, self.me, self.patient, self.say = directory, me, patient, say
        self.since = self.began = time.monotonic()
        self.said: float | None = None
        self.why = ""
        self.contents: bytes | None = None
        self.owner: Owner | None = None
        self.beats = False
        self.asked: str | None = None

    def look(self) -> bool:
        """Whether there is no owner, or one that is certainly gone."""
        now, before = contents_of(self.directory), self.contents
        if now is None:
            self.owner = self.contents = None
            return True
        if now != before:
            self.contents, self.since, self.beats = now, time.monotonic(), before is not None
            self.owner = Owner.read(now)
        if self.owner is not None and self.owner.is_here():
            return self.owner.has_ended()
        return time.monotonic() - self.since > WATCH_S

    def wait(self) -> None:
        """Let some time pass.

        Raises:
            RunInUseError: no more of it would help.
        """
        limit_s, why = self._patience()
        now = time.monotonic()
        if why != self.why:
            self.why, self.began, self.said = why, now, None
        if now - self.began >= limit_s:
            raise self._in_use()
        if limit_s > _MOMENT_S and (self.said is None or now - self.said > _SAY_S):
            self.said = now
            self.say(f"waiting for {self.owner or 'another process'} in {self.directory}: {why}")
        time.sleep(_POLL_S)

    def _patience(self) -> tuple[float, str]:
        """How long to wait, in seconds, and for what."""
        owner = self.owner
        if owner is None and self.contents is None:
            return _MOMENT_S, "it is about to end or has just begun"
        if owner is not None and self.patient and owner.is_predecessor_of(self.me):
            self._ask(owner)
            return TAKEOVER_WAIT_S, "it is an earlier start of this job and is asked to stop and save"
        if owner is not None and owner.is_here():
            if owner.has_ended():
                return _MOMENT_S, "it has ended"
            if self.patient and owner.is_orphan():
                return ORPHAN_WAIT_S, "its launcher was killed, so it is about to save and end"
            return 0.0, ""
        if self.beats:
            return 0.0, ""
        return TAKEOVER_WAIT_S, f"whether its heart beats shows within {WATCH_S:.0f} s"

    def _ask(self, owner: Owner) -> None:
        if self.asked != owner.key:
            write_text_atomic(self.directory / REQUEST, json.dumps({"owner": owner.key, "by": str(self.me)}))
            self.asked = owner.key

    def _in_use(self) -> RunInUseError:
        who = self.owner or "another process"
        if self.owner is not None and self.owner.key == self.asked:
            return RunInUseError(
                f"the run directory {self.directory} is in use by {who}, an earlier start of this job, which was asked "
                f"to go and has not within {TAKEOVER_WAIT_S:.0f} s. End that process (scontrol show job, then kill it "
                f"there), then start again with --run.resume auto; nothing of the run is lost."
            )
        return RunInUseError(
            f"the run directory {self.directory} is in use by {who}. Wait for that job or stop it, or choose another "
            f"--run.name."
        )


def acquire(directory: Path, patient: bool, say: Callable[[str], None]) -> Claim:
    """Own `directory`, which must exist.

    Args:
        patient: wait for an owner that is about to go, and ask an earlier start of the same Slurm job to go.
        say: prints a line.

    Raises:
        RunInUseError: another process is at work in it.
        OSError: it cannot be written.
    """
    me = Owner.me()
    watch = _Watch(directory, me, patient, say)
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not (_flock(lock) and watch.look()):
            watch.look()
            watch.wait()
        claim = Claim(directory, me, lock)
    except BaseException:
        os.close(lock)
        raise
    finally:
        if watch.asked:
            (directory / REQUEST).unlink(missing_ok=True)
    if watch.contents is not None:
        say(f"{watch.owner or 'the former owner'} left {directory} without a word and is gone; taken over")
        if not (watch.owner and watch.owner.is_here()):
            time.sleep(BEAT_S)  # another machine may have seen the same and come to the same end: the last one has it
    return claim


def _flock(descriptor: int) -> bool:
    """Whether the kernel grants the lock, or knows of none here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
