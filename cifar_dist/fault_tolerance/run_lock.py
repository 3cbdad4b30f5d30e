"""One process at a time owns a run directory, on one node and across nodes.

The lock is a lease (filelock.SoftFileLease): its owner refreshes a marker file every 2 s, and another process may take
the lease over once it has seen no refresh for `LEASE_S`. It works on network file systems without kernel locks, and
does not compare clocks. A requeued Slurm job does not wait for that: it asks the earlier start of the same job, which
may still run, to save and exit.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from filelock import SoftFileLease, Timeout

from cifar_dist import environment
from cifar_dist.errors import RunInUseError, write_exit_code
from cifar_dist.fault_tolerance import signals
from cifar_dist.files import read_json, write_json
from cifar_dist.filesystem import LEASE_S, REFRESH_S
from cifar_dist.process import write_stderr

LOCK, JOB, REQUEST = ".lock", ".lock.job", ".lock.request"
EXIT_S = 60.0  # then an owner that lost the lease or was asked to exit ends itself without saving
REQUEST_WAIT_S = 120.0  # longer than EXIT_S, and than a file server keeps the locks of a dead client
WAIT_S = 30.0  # longer than workers outlive their launcher (signals._ORPHAN_GRACE_S)
_POLL_S, _LOG_EVERY_S = 0.5, 15.0
_LOG_AFTER_S = 1.0  # by then the lease of a process that died on this node has been taken over


class Owner(NamedTuple):
    """A process that owns a run directory, or wants to."""

    pid: int
    host: str
    job: str | None = None  # of Slurm
    restarts: int = 0  # of that job
    token: str | None = None  # of its lease

    def __str__(self) -> str:
        restart = f", restart {self.restarts}" if self.restarts else ""
        return f"process {self.pid} on {self.host}" + (f" (job {self.job}{restart})" if self.job else "")


class RunLock:
    """The right to write in `directory`, from `acquire` until `release`. A thread watches for its loss."""

    def __init__(self, directory: Path, lease: SoftFileLease) -> None:
        self.directory = directory
        self._lease, self._token = lease, lease.token
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run lock", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether this process still owns the directory; True if the marker cannot be read. Costs one small read."""
        if self._lease.compromise is not None:
            return False
        record = self._lease.owner
        if record is not None:
            return record.token == self._token
        try:
            (self.directory / LOCK).stat()  # not exists(), which hides errors from Python 3.14 on
        except FileNotFoundError:
            return False
        except OSError:
            pass
        return True

    def check(self) -> None:
        """Call before writing.

        Raises:
            RunInUseError: the lease is lost.
        """
        if not self.held():
            other = owner(self.directory)
            raise RunInUseError(
                f"this run no longer owns its directory {self.directory}: "
                f"{f'{other} owns it now' if other else f'its {LOCK} is gone'}. This process was suspended for longer "
                f"than {LEASE_S:.0f} s, or {LOCK} was removed. It has written nothing since. status.json has "
                f"the state of the run; if it has ended, resume with --run.resume auto."
            )

    def release(self) -> None:
        self._released.set()
        self._thread.join(REFRESH_S)
        with suppress(OSError):
            if self.held():
                (self.directory / JOB).unlink(missing_ok=True)
            self._lease.release()

    def _watch(self) -> None:
        stop_since: float | None = None
        while not self._released.wait(REFRESH_S):
            request = read_json(self.directory / REQUEST)
            successor = request.get("by") if request.get("token") == self._token else None
            if successor is None and self.held():
                continue
            if stop_since is None:
                stop_since = time.monotonic()
                if successor:
                    write_stderr(f"\nasked by {successor} to release the run directory; stopping")
            signals.request()  # repeated, since it has no effect before the first step
            if time.monotonic() - stop_since > EXIT_S:
                # The main thread may hang in a collective, and must not write after the lease is lost.
                text = (
                    "error: the run did not stop in time after losing its directory or a request to release it; killed."
                )
                write_stderr(f"{text} Resume with --run.resume auto.")
                write_exit_code(RunInUseError.exit_code)
                os._exit(RunInUseError.exit_code)


def acquire(directory: Path, wait: bool, log: Callable[[str], None]) -> RunLock:
    """Own `directory`, which must exist.

    A lease whose owner died on this node is taken over at once, any other after LEASE_S without a refresh.

    Args:
        wait: wait WAIT_S for an owner that is alive, since it may be about to exit; and if it is an earlier start of
            this Slurm job, ask it to exit and wait REQUEST_WAIT_S.
        log: prints a line.

    Raises:
        RunInUseError: another process owns it.
        OSError: the marker cannot be written.
    """
    lease = SoftFileLease(
        directory / LOCK, lease_duration=LEASE_S, heartbeat_interval=REFRESH_S, thread_local=False, mode=0o666
    )
    waiter, (job, restarts) = _Waiter(directory, wait, log), slurm_job()
    try:
        lease.acquire(poll_interval=_POLL_S, cancel_check=waiter.gives_up)
    except Timeout:
        in_use = f"the run directory {directory} is in use by {waiter.owner or 'another process'}"
        raise RunInUseError(f"{in_use}. Wait for that job or stop it, or choose another --run.name.") from None
    finally:
        if waiter.requested is not None:
            (directory / REQUEST).unlink(missing_ok=True)
    if waiter.owner is not None:
        log(f"{waiter.owner} no longer holds {directory}; taken over")
    if job is not None:
        write_json(directory / JOB, {"token": lease.token, "job": job, "restarts": restarts})
    return RunLock(directory, lease)


class _Waiter:
    """Decides how long to wait for the owner of a lease."""

    def __init__(self, directory: Path, wait: bool, log: Callable[[str], None]) -> None:
        self.directory, self.wait, self.log = directory, wait, log
        self.owner = owner(directory)  # the last one seen
        self.requested: str | None = None  # the token of the owner that was asked to exit
        self._began = time.monotonic()
        self._log_at = self._began + _LOG_AFTER_S
        self._first_mtime_ns: dict[str | None, int] = {}  # by token

    def gives_up(self) -> bool:
        """Called while the lease is not acquired: whether to stop waiting."""
        try:
            mtime_ns = (self.directory / LOCK).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        found, (job, restarts), now = owner(self.directory), slurm_job(), time.monotonic()
        self.owner = found or self.owner
        token = None if found is None else found.token
        alive = mtime_ns != self._first_mtime_ns.setdefault(token, mtime_ns)
        if self.wait and found and job and found.job == job and found.restarts < restarts:
            if self.requested != token:
                successor = Owner(os.getpid(), socket.gethostname(), job, restarts)
                write_json(self.directory / REQUEST, {"token": token, "by": str(successor)})
                self.requested, self._began, self._log_at = token, now, now
            limit_s, reason = REQUEST_WAIT_S, "it is an earlier start of this job and was asked to save and exit"
        elif alive:
            limit_s, reason = WAIT_S if self.wait else 0.0, f"it is alive; waiting {WAIT_S:.0f} s for it to exit"
        else:
            limit_s = LEASE_S + WAIT_S
            reason = f"not refreshed yet; its lease expires after {LEASE_S:.0f} s without a refresh"
        if now - self._began >= limit_s:
            return True
        if now >= self._log_at:
            self._log_at = now + _LOG_EVERY_S
            self.log(f"waiting for {self.owner or 'another process'} in {self.directory}: {reason}")
        return False


def owner(directory: Path) -> Owner | None:
    """The owner of `directory`, None without one."""
    record, job = SoftFileLease(directory / LOCK).owner, read_json(directory / JOB)
    if record is None:
        return None
    if job.get("token") != record.token:
        job = {}
    # filelock escapes odd characters of the host name, and in a container appends the namespace of process ids.
    host = unquote(record.hostname.partition("?pidns-")[0].replace("?", "%"))
    return Owner(record.pid, host, job.get("job"), job.get("restarts", 0), record.token)


def slurm_job() -> tuple[str | None, int]:
    """The id of this Slurm job, and how often it was requeued."""
    job = environment.optional_number("SLURM_JOB_ID")
    return None if job is None else str(job), environment.number("SLURM_RESTART_COUNT", 0)
