"""The process that owns a run directory, or wants to, as its .owner tells it to others."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cifar_dist import processes, stopping

FILE = ".owner"


@dataclass(frozen=True)
class Owner:
    """A process that owns a run directory, or wants to. `restarts`: how often Slurm has requeued its job."""

    key: str
    host: str
    boot: str
    namespace: str
    pid: int
    ticks: int | None
    launcher: int | None
    job: str | None
    restarts: int

    @staticmethod
    def me() -> Owner:
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
        count = os.environ.get("SLURM_RESTART_COUNT", "0")
        return Owner(
            secrets.token_hex(8), *processes.place(), pid, processes.started_ticks(pid), stopping.launcher_pid(), job,
            int(count) if count.isdecimal() else 0,
        )  # fmt: skip

    @staticmethod
    def read(text: bytes) -> Owner | None:
        """The one in the bytes of an .owner; None if they are those of no living process of this version."""
        try:
            values = json.loads(text)
            owner = Owner(**{field.name: values[field.name] for field in fields(Owner)})
            ok = isinstance(owner.pid, int) and isinstance(owner.restarts, int)
        except (ValueError, KeyError, TypeError):
            return None
        return owner if ok else None

    def text(self, beat: int) -> bytes:
        """Of the same length for every beat, so that writing over the last one leaves nothing of it."""
        return json.dumps({**asdict(self), "beat": f"{beat:012d}"}).encode() + b"\n"

    def __str__(self) -> str:
        restart = f", restart {self.restarts}" if self.restarts else ""
        return f"process {self.pid} on {self.host}" + (f" (job {self.job}{restart})" if self.job else "")

    def is_here(self) -> bool:
        """Whether its process id means here what it meant there."""
        place = processes.place()
        return all(place) and place == (self.host, self.boot, self.namespace)

    def has_ended(self) -> bool:
        """Whether it is certain without watching it."""
        return self.is_here() and processes.is_gone(self.pid, self.ticks)

    def is_orphan(self) -> bool:
        """Whether its launcher was killed, so that it will end soon."""
        return self.launcher is not None and self.is_here() and processes.parent_of(self.pid) != self.launcher

    def is_predecessor_of(self, other: Owner) -> bool:
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


def contents_of(directory: Path) -> bytes | None:
    """The bytes of its .owner, for `Owner.read`; None without one."""
    try:
        return (directory / FILE).read_bytes()
    except FileNotFoundError:
        return None
