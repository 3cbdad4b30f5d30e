"""Limits of the system, of the container and of the user."""

import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from cifar_dist.cluster.slurm_job import processes_per_node
from cifar_dist.diagnosis.checks import Finding, Folders
from cifar_dist.diagnosis.devices import nvidia_files
from cifar_dist.environment import cgroup_folders, num_processors

# NCCL's processes on one machine exchange through shared memory; containers have 64 MB by default.
_SHARED_BYTES = 1_000_000_000
_PROCESS_BYTES = 1_000_000_000  # a process that has imported torch and FFCV was seen with 975 MB
_PROCESS_THREADS = 100  # of one process of a run; libraries start some for each processor
_FILES = 1024  # files, connections and libraries of a process


def limits(_: Folders) -> Iterator[Finding]:
    """What is too little, each as a finding, then what there is."""
    processes, processors, memory = processes_per_node(), num_processors(), _free_memory()
    shared, files, tasks = _shared_memory(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], _free_tasks()
    if shared < _SHARED_BYTES:
        found = f"/dev/shm has {shared / 1e6:.0f} MB; NCCL needs more for several GPUs"
        advice = "docker run --shm-size=1g; elsewhere: mount -o remount,size=1g /dev/shm"
        yield Finding("problem" if len(nvidia_files()) > 1 else "warning", found, advice)
    if files != resource.RLIM_INFINITY and files < _FILES:
        yield Finding("warning", f"a process may open {files} files only", "ulimit -n 4096")
    if tasks is not None and tasks < _PROCESS_THREADS * processes:
        found = f"only {tasks} more processes and threads are allowed, for {processes} processes"
        yield Finding("warning", found, "Raise ulimit -u, or the container's --pids-limit")
    if memory < _PROCESS_BYTES * processes:
        found = f"{memory / 1e9:.1f} GB of memory are free for {processes} processes of about 1 GB each"
        yield Finding("warning", found, "Stop other programs, raise the limit of the container, or --mem of the job")
    if processors < processes:
        found = f"{processes} processes share {processors} processor(s)"
        yield Finding("warning", found, "Give the job or container a processor for each, or lower NPROC_PER_NODE")
    if any(Path("/dev").glob("infiniband/uverbs*")):
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked != resource.RLIM_INFINITY:
            found = f"{locked / 1e6:.0f} MB may be locked in memory; InfiniBand needs more"
            yield Finding("warning", found, "ulimit -l unlimited; docker run --ulimit memlock=-1")
    open_files = "unlimited" if files == resource.RLIM_INFINITY else files
    found = f"{processors} processor(s) for {processes} process(es), {memory / 1e9:.1f} GB of memory free"
    yield Finding("ok", f"{found}, /dev/shm {shared / 1e9:.1f} GB, {open_files} open files")


def _shared_memory() -> int:
    """Size of /dev/shm in bytes; 0 if there is none."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").total
    return 0


def _free_memory() -> int:
    """Bytes that the machine and each memory cgroup of this process still have; cached files count as free."""
    free = [psutil.virtual_memory().available]
    for folder in cgroup_folders("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # "max": no limit
                statistics = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                reclaimable = int(statistics[1]) if statistics else 0
                free.append(_number(folder / limit) - _number(folder / used) + reclaimable)
    return max(0, min(free))


def _free_tasks() -> int | None:
    """Processes and threads that may still be started; None: without a limit."""
    free = []
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY and os.getuid() != 0:  # it does not bind root
        own = (process.info for process in psutil.process_iter(["uids", "num_threads"]))
        free.append(limit - sum(i["num_threads"] or 0 for i in own if i["uids"] and i["uids"].real == os.getuid()))
    for folder in cgroup_folders("pids"):
        with suppress(OSError, ValueError):
            free.append(_number(folder / "pids.max") - _number(folder / "pids.current"))
    return min(free, default=None)


def _number(path: Path) -> int:
    return int(path.read_text())
