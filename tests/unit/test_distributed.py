"""Joining a process group and leaving it, and what that does to inductor, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support import runs

# All that cifar_dist.train imports before it joins the process group; then each case in a fork of this process, all at
# a time. On two processors, of which inductor would take both.
PROGRAM = """
import json, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from cifar_dist import train
from cifar_dist.distributed import init_distributed
from cifar_dist.training.run import Run
import torch.distributed as dist

reader, writer = os.pipe()
for name, changes in json.load(sys.stdin).items():
    if os.fork() == 0:
        break
else:
    os.close(writer)
    while True:
        os.wait()  # an error in the end
os.environ |= changes
hosts_store = changes.get("RANK") == "0"  # it ends last: the others may still be joining
if hosts_store:
    os.close(writer)
found = {"inductor came before": "torch._inductor.config" in sys.modules}
try:
    with init_distributed("cpu"):
        found |= {"threads": os.environ["TORCHINDUCTOR_COMPILE_THREADS"], "joined": dist.is_initialized()}
        if name == "one of two":  # not in all, as this takes seconds
            from torch._inductor import config
            found["of inductor"] = config.compile_threads
        if "fails" in name:
            raise RuntimeError
except RuntimeError:
    pass
found["left"] = not dist.is_initialized()
os.write(1, json.dumps([name, found]).encode() + b"\\n")  # at once, as others write to the same pipe
if hosts_store:
    os.read(reader, 1)  # until the others have ended
os._exit(0)
"""
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHINDUCTOR_COMPILE_THREADS")
ALONE = {
    "alone": {},
    "one of two": {"LOCAL_WORLD_SIZE": "2"},
    "one of eight": {"LOCAL_WORLD_SIZE": "8"},
    "set by the user": {"LOCAL_WORLD_SIZE": "2", "TORCHINDUCTOR_COMPILE_THREADS": "7"},
}


def pair(name: str) -> dict[str, dict[str, str]]:
    """Two ranks of one group."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": runs.free_port()}
    return {f"rank {rank}, which {name}": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What the program finds in each case."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    cases = json.dumps(ALONE | pair("ends") | pair("fails"))
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, cwd=runs.REPOSITORY, env=clean, input=cases, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, check=False)  # fmt: skip
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("name", "threads"),
    [("alone", 2), ("one of two", 1), ("one of eight", 1), ("set by the user", 7), ("rank 1, which ends", 1)],
)
def test_processes_that_inductor_starts(name: str, threads: int, found: dict[str, dict[str, Any]]) -> None:
    """One for each processor of the rank. Inductor reads the number when it is imported."""
    assert not found[name]["inductor came before"]
    assert found[name].get("of inductor", threads) == threads
    assert int(found[name]["threads"]) == (min(threads, len(runs.CPUS)) if name == "alone" else threads)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "left"), [("ends", True), ("fails", False)])
def test_the_group_is_left_at_the_end_and_not_after_an_error(
    rank: int, name: str, left: bool, found: dict[str, dict[str, Any]]
) -> None:
    """With NCCL leaving it waits for the last kernels, and those for a lost rank."""
    assert found[f"rank {rank}, which {name}"] == {
        "inductor came before": False, "threads": "1", "joined": True, "left": left,
    }  # fmt: skip
