"""Environment variables that hold numbers, and how many processors this process may use.

An empty variable counts as unset: scripts and schedulers leave empty ones behind.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from cifar_dist.errors import UserError

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def number(name: str, default: int, least: int = 0) -> int:
    """The whole number in the environment variable `name`; `default` if it is unset or empty.

    Raises:
        UserError: it holds something else, or less than `least`.
    """
    found = optional_number(name, os.environ, least)
    return default if found is None else found


def optional_number(name: str, env: Mapping[str, str] = os.environ, least: int = 0) -> int | None:
    """Like `number`, in `env`; None if it is unset or empty."""
    text = env.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise UserError(
            f"the environment variable {name} is {text[:80]!r}; valid: a whole number, {least} or more.\n"
            f"Correct it, or remove it: unset {name}"
        )
    return int(text)


def num_processors(cgroups: Path = _CGROUPS, own: Path = _OWN, shared_by: int = 1) -> int:
    """Processors for each of `shared_by` processes: of the affinity, or fewer by the CPU quota (cgroup v1 and v2)."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(cgroups, own)])) // shared_by)


def num_threads(local_size: int) -> int:
    """Threads for each of `local_size` processes on this node: their share of the processors, or OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS to 1 for its workers if it is not set, so that value does not count there.
    """
    share = num_processors(shared_by=local_size)
    given = re.match(r"\s*([1-9][0-9]{0,3})\b", os.environ.get("OMP_NUM_THREADS", ""))  # OpenMP allows 4,2
    if given is None or ("TORCHELASTIC_RUN_ID" in os.environ and given[1] == "1"):
        return share
    return min(share, int(given[1]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Processors by the quota of each cgroup that this process is in."""
    quotas = []
    for folder in cgroup_folders("cpu", cgroups, own):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quotas.append(_quota(folder))
    return [quota for quota in quotas if quota > 0]


def cgroup_folders(controller: str, cgroups: Path = _CGROUPS, own: Path = _OWN) -> Iterator[Path]:
    """Where the limits of `controller` (cpu, memory, pids) are for this process, in cgroup v1 and v2.

    A folder for each cgroup that it is in, up to the root of those that are visible; it may not exist.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        # Mounted as it is listed, as one of several links to that, or by another order of the same names.
        mounts = {controller, controllers, ",".join(reversed(names))} if controller in names else ()
        for root in [cgroups / name for name in mounts] if controllers else [cgroups, cgroups / "unified"]:
            folder = root / path.lstrip("/")
            for level in (folder, *folder.parents):
                yield level
                if level == root:
                    break


def _quota(folder: Path) -> float:
    """Processors by the quota of one cgroup; at most 0: no quota."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    return int((folder / "cpu.cfs_quota_us").read_text()) / int((folder / "cpu.cfs_period_us").read_text())
