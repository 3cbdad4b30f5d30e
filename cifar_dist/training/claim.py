"""The right to write in a run directory: one process has it, which .owner names and whose heart beats in it.

The heartbeat is a count, written into the same file again and again; others compare its contents and no clocks. Who
takes a directory over puts a new file in .owner's place (see `takeover`). So a former owner that comes back, its
machine having stood still, beats into a file without a name, and learns from the new one that it must not write.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from cifar_dist import stopping
from cifar_dist.errors import RunInUseError, leave_code
from cifar_dist.files import sync_directory
from cifar_dist.training import owner
from cifar_dist.training.owner import Owner, contents_of

REQUEST = ".takeover"
BEAT_S = 2.0
LEAVE_S = 60.0
"""An owner that is asked to go, or has lost the directory, and has not ended after so long, is ended."""


class Claim:
    """The right to write in `directory`; made by `acquire`. A thread keeps its heart beating until `release`."""

    def __init__(self, directory: Path, me: Owner, lock: int) -> None:
        self.directory, self._me, self._lock = directory, me, lock
        self._end = threading.Event()
        self._file = _put(directory, me)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether the directory is still this process's; costs one small read. In doubt it is."""
        try:
            contents = contents_of(self.directory)
        except OSError:
            return True
        found = Owner.read(contents or b"")  # there may be none: who took it over may have ended by now
        return found is not None and found.key == self._me.key

    def check(self) -> None:
        """Call before writing.

        Raises:
            RunInUseError: another process has taken the directory over.
        """
        if not self.held():
            other = Owner.read(contents_of(self.directory) or b"")
            who = f"{other} has it now" if other else f"its {owner.FILE} is gone"
            raise RunInUseError(
                f"the run directory {self.directory} is no longer this run's: {who}. This run stood still for so long "
                f"that it seemed dead, or somebody removed {owner.FILE}; it wrote nothing since. See its status.json "
                f"for how the run went on. If it did not, start it again with --run.resume auto."
            )

    def release(self) -> None:
        """Give the directory back."""
        self._end.set()
        self._thread.join(BEAT_S)
        with suppress(OSError):
            if self.held():
                (self.directory / owner.FILE).unlink(missing_ok=True)
        if not self._thread.is_alive():  # else it hangs in a write, to whatever the number then stands for
            os.close(self._file)
        os.close(self._lock)

    def _beat(self) -> None:
        beat, told, asked_at = 0, False, None
        while not self._end.wait(BEAT_S):
            beat += 1
            with suppress(OSError):
                os.pwrite(self._file, self._me.text(beat), 0)
                os.fdatasync(self._file)  # a network file system may keep it back otherwise
            successor = self._successor()
            if successor is not None or not self.held():
                asked_at = asked_at or time.monotonic()
                if successor and not told:
                    os.write(2, f"\nasked by {successor} to leave the run directory to it; stopping\n".encode())
                    told = True
                stopping.ask()  # again and again: before the first step nobody hears it
            if asked_at is not None and time.monotonic() - asked_at > LEAVE_S:
                _end_here()

    def _successor(self) -> str | None:
        """Who asks for the directory, if anyone may."""
        try:
            request = json.loads((self.directory / REQUEST).read_bytes())
            return str(request["by"]) if request["owner"] == self._me.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _end_here() -> None:
    """Leave at once: the main thread may wait for processes that are gone, and must not go on to write some day."""
    os.write(2, b"error: the run did not stop in time after its run directory was taken over; ended.\n")
    leave_code(RunInUseError.exit_code)
    os._exit(RunInUseError.exit_code)


def _put(directory: Path, me: Owner) -> int:
    """Put a new .owner in the place of any, and return it open."""
    temporary = directory / f"{owner.FILE}.{me.key}.tmp"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(file, me.text(0))
        os.fsync(file)
        temporary.replace(directory / owner.FILE)
        sync_directory(directory)
    except BaseException:
        os.close(file)
        temporary.unlink(missing_ok=True)
        raise
    return file
