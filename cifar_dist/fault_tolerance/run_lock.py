"""One process at a time owns a run directory, on one node and across nodes.

The lock is a lease (filelock.SoftFileLease): its owner refreshes a marker file every 2 s, and another process may take
the lease over once it has seen no refresh for `LEASE_S`. It works on network file systems without kernel locks, and
does not compare clocks. A requeued Slurm job does not wait for that: it asks the earlier start of the same job, which
may still run, to save and exit.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from cifar_dist.errors import RunInUseError, write_exit_code
from cifar_dist.fault_tolerance import signals
from cifar_dist.files import write_text_atomic

LOCK, JOB, REQUEST = ".lock", ".lock.job", ".lock.request"
LEASE_S = 20.0  # ten heartbeats; a file server may delay one by some seconds
HEARTBEAT_S = 2.0
EXIT_S = 60.0
"""An owner that lost the lease or was asked to exit is killed after this time."""
REQUEST_WAIT_S = 120.0  # longer than EXIT_S, and than a file server keeps the locks of a dead client
WAIT_S = 30.0  # longer than workers outlive their launcher (signals._ORPHAN_GRACE_S)
_POLL_S, _LOG_S = 0.5, 15.0


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
        try:
            (self.directory / LOCK).stat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        owner = self._lease.owner
        return owner is None or owner.token == self._token

    def check(self) -> None:
        """Call before writing.

        Raises:
            RunInUseError: the lease is lost.
        """
        if not self.held():
            owner = _owner(self._lease)
            raise RunInUseError(
                f"this run no longer owns its directory {self.directory}: "
                f"{f'{owner} owns it now' if owner else f'its {LOCK} is gone'}. This process was suspended for longer "
                f"than {LEASE_S:.0f} s, or {LOCK} was removed. It has written nothing since. status.json tells how the "
                f"run went on; if it did not, resume with --run.resume auto."
            )

    def release(self) -> None:
        self._released.set()
        self._thread.join(HEARTBEAT_S)
        with suppress(OSError):
            if self.held():
                (self.directory / JOB).unlink(missing_ok=True)
            self._lease.release()

    def _watch(self) -> None:
        stop_since: float | None = None
        while not self._released.wait(HEARTBEAT_S):
            successor = self._requested_by()
            if successor is None and self.held():
                continue
            if stop_since is None:
                stop_since = time.monotonic()
                if successor:
                    os.write(2, f"\nasked by {successor} to release the run directory; stopping\n".encode())
            signals.request()  # repeated, since it has no effect before the first step
            if time.monotonic() - stop_since > EXIT_S:
                # The main thread may hang in a collective, and must not write after the lease is lost.
                os.write(2, b"error: the run did not stop in time after losing its run directory; killed.\n")
                write_exit_code(RunInUseError.exit_code)
                os._exit(RunInUseError.exit_code)

    def _requested_by(self) -> str | None:
        request = _read_json(self.directory / REQUEST)
        return str(request.get("by")) if request.get("token") == self._token else None


def acquire(directory: Path, wait: bool, log: Callable[[str], None]) -> RunLock:
    """Own `directory`, which must exist.

    A lease whose owner died on this node is taken over at once, any other after LEASE_S without a heartbeat.

    Args:
        wait: wait WAIT_S for an owner that is alive, since it may be about to exit; and if it is an earlier start of
            this Slurm job, ask it to exit and wait REQUEST_WAIT_S.
        log: prints a line.

    Raises:
        RunInUseError: another process owns it.
        OSError: the marker cannot be written.
    """
    lease = SoftFileLease(
        directory / LOCK, lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S, thread_local=False, mode=0o666
    )
    waiter = _Waiter(directory, lease, wait, log)
    try:
        lease.acquire(poll_interval=_POLL_S, cancel_check=waiter.gives_up)
    except Timeout:
        raise waiter.error() from None
    finally:
        if waiter.requested is not None:
            (directory / REQUEST).unlink(missing_ok=True)
    if waiter.owner is not None:
        log(f"{waiter.owner} no longer holds {directory}; taken over")
    job, restarts = _slurm_job()
    if job is not None:
        write_text_atomic(directory / JOB, json.dumps({"token": lease.token, "job": job, "restarts": restarts}))
    return RunLock(directory, lease)


class _Waiter:
    """Decides how long to wait for the owner of a lease."""

    def __init__(self, directory: Path, lease: SoftFileLease, wait: bool, log: Callable[[str], None]) -> None:
        self.directory, self.lease, self.wait, self.log = directory, lease, wait, log
        self.owner = _owner(lease)  # the last one seen, for messages
        self.requested: str | None = None  # the token of the owner that was asked to exit
        self._began = time.monotonic()
        self._logged = self._began - _LOG_S + 1  # not yet: a lease of a dead process here is free at once
        self._first_mtime_ns: dict[str | None, int] = {}  # by token

    def gives_up(self) -> bool:
        """Called while the lease is not acquired: whether to stop waiting."""
        try:
            mtime_ns = (self.directory / LOCK).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        record = self.lease.owner
        token = None if record is None else record.token
        alive = mtime_ns != self._first_mtime_ns.setdefault(token, mtime_ns)
        self.owner = _owner(self.lease) or self.owner
        now = time.monotonic()
        if self.wait and self._is_earlier_start(token):
            if self.requested != token:
                request = {"token": token, "by": _description(os.getpid(), socket.gethostname(), *_slurm_job())}
                write_text_atomic(self.directory / REQUEST, json.dumps(request))
                self.requested, self._began, self._logged = token, now, now - _LOG_S
            limit_s, reason = REQUEST_WAIT_S, "it is an earlier start of this job and was asked to save and exit"
        elif alive:
            limit_s, reason = WAIT_S if self.wait else 0.0, f"it is alive; waiting {WAIT_S:.0f} s for it to exit"
        else:
            limit_s = LEASE_S + WAIT_S
            reason = f"no heartbeat seen yet; without one for {LEASE_S:.0f} s its lease expires"
        if now - self._began >= limit_s:
            return True
        if now - self._logged >= _LOG_S:
            self._logged = now
            self.log(f"waiting for {self.owner or 'another process'} in {self.directory}: {reason}")
        return False

    def _is_earlier_start(self, token: str | None) -> bool:
        job, restarts = _slurm_job()
        if job is None or token is None:
            return False
        other = _read_json(self.directory / JOB)
        return other.get("token") == token and other.get("job") == job and other.get("restarts", restarts) < restarts

    def error(self) -> RunInUseError:
        owner = self.owner or "another process"
        if self.requested is not None:
            return RunInUseError(
                f"the run directory {self.directory} is in use by {owner}, an earlier start of this job, which was "
                f"asked to exit and has not within {REQUEST_WAIT_S:.0f} s. Kill that process (scontrol show job names "
                f"its node), then start again with --run.resume auto; nothing of the run is lost."
            )
        return RunInUseError(
            f"the run directory {self.directory} is in use by {owner}. Wait for that job or stop it, or choose another "
            f"--run.name."
        )


def _slurm_job() -> tuple[str | None, int]:
    """The id of this Slurm job, and how often it was requeued."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID"), int(count) if count.isdecimal() else 0


def _owner(lease: SoftFileLease) -> str | None:
    """The owner that the marker names, for messages."""
    record = lease.owner
    if record is None:
        return None
    job = _read_json(Path(lease.lock_file).with_name(JOB))
    mine = job if job.get("token") == record.token else {}
    # In a container filelock appends the namespace of process ids to the host name.
    return _description(record.pid, record.hostname.split("?")[0], mine.get("job"), mine.get("restarts", 0))


def _description(pid: int, host: str, job: str | None, restarts: int) -> str:
    restart = f", restart {restarts}" if restarts else ""
    return f"process {pid} on {host}" + (f" (job {job}{restart})" if job else "")


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
