"""Processes of this machine exchange a tensor, started and connected as training starts and connects them.

`python -m cifar_dist.diagnosis.exchange auto|cpu` is one of them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from cifar_dist.cluster.slurm_job import gpus_per_node
from cifar_dist.diagnosis.checks import CHECKS, Finding, Folders
from cifar_dist.errors import PeerError, exit_on_error, one_line
from cifar_dist.process import run_and_exit

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NUM_FLOATS, _REPETITIONS = 1 << 22, 5


def processes(_: Folders) -> Iterator[Finding]:
    """All GPUs by NCCL; with fewer than two, two processes by gloo."""
    num_gpus = gpus_per_node()
    size, device = (num_gpus, "auto") if num_gpus > 1 else (2, "cpu")
    launcher = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", str(size)]
    words = [*launcher, "-m", "cifar_dist.diagnosis.exchange", device]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    if done.returncode == 0:
        figures = json.loads(done.stdout.splitlines()[-1])
        megabytes, seconds = _NUM_FLOATS * 4e-6, figures["seconds"]
        speed = f"{megabytes:.0f} MB in {seconds * 1e3:.1f} ms ({megabytes / seconds / 1e3:.2g} GB/s)"
        yield Finding("ok", f"{size} processes exchange by {figures['backend']}: all-reduce of {speed}")
        return
    found, advice = _reason(done.stderr, done.returncode)
    given = [f"{name}={os.environ[name]}" for name in _INTERFACES if os.environ.get(name)]
    if given:
        advice = f"{' '.join(given)} may name no interface of this machine (ip address): unset {given[0].split('=')[0]}"
    yield Finding("problem", f"{size} processes cannot exchange a tensor: {found}", advice)


def _reason(errors: str, code: int) -> tuple[str, str]:
    """The first error that the launcher or a process printed, else the last line; and what to do."""
    advice = next((line for line in errors.splitlines() if "ip link" in line), CHECKS["processes"].advice)
    lines = [line for line in errors.splitlines() if line.strip() and "cifar_dist.doctor" not in line]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return one_line([*found, *lines[-1:], f"exit code {code}"][0]), advice


def main() -> None:
    """Be one of the processes; rank 0 prints the figures."""
    with exit_on_error():
        import torch

        from cifar_dist.distributed import all_reduce_sum, init_distributed

        with init_distributed(sys.argv[1]) as world:
            own = torch.arange(_NUM_FLOATS, device=world.device).remainder(1000).float()
            right, seconds = own * world.size, list[float]()
            for _ in range(_REPETITIONS):
                started = time.perf_counter()
                found = all_reduce_sum(own.clone(), world)
                if not torch.equal(found, right):  # it waits for the device
                    raise PeerError(f"the sum over {world.size} processes is wrong on {world.name}")
                seconds.append(time.perf_counter() - started)
            if world.is_main:
                backend = "NCCL" if world.device.type == "cuda" else "gloo"
                print(json.dumps({"backend": backend, "seconds": min(seconds)}))


if __name__ == "__main__":
    run_and_exit(main)
