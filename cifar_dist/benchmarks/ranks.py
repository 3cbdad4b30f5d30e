"""What `bench scaling` starts under torchrun: the same step on 1, 2, 4 ... of the ranks, in turn."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.benchmarks import networks
from cifar_dist.benchmarks.device import wait_for
from cifar_dist.benchmarks.networks import Subject
from cifar_dist.config import ModelConfig, TrainConfig
from cifar_dist.distributed import World, data_parallel, joined
from cifar_dist.files import write_text_atomic
from cifar_dist.processes import run_and_exit
from cifar_dist.training.precision import number_format, set_backends


@dataclass
class Job:
    """What `bench scaling` tells its ranks, as JSON."""

    device: str
    precision: str
    stem: str
    width: float
    micro_batch_size: int
    sizes: list[int]
    """Numbers of ranks, from 1 to all."""
    repeats: int
    seconds: float
    compiled: bool
    out: str


@dataclass
class Part:
    """The first `size` ranks as a world of their own; on CPUs each has its share of the processors."""

    size: int
    group: Any
    takes_part: bool
    threads: int
    cpus: set[int] = field(default_factory=set)


Case = tuple[str, Part, Callable[[], object]]


def main() -> None:
    """Measure as a rank; rank 0 writes the figures."""
    job = Job(**json.loads(sys.argv[1]))
    cpus = sorted(os.sched_getaffinity(0))
    with joined(job.device) as world:
        formats = number_format(job.precision, world.device)
        set_backends(TrainConfig(), deterministic=False)
        model = ModelConfig(stem=job.stem, width=job.width)  # type: ignore[arg-type]
        mode = "default" if job.compiled else None
        figures: dict[str, list[float]] = {}
        cases = []
        for size in job.sizes:  # each with a network of its own, as each DDP hangs hooks on the parameters
            subject = networks.ours(model, job.micro_batch_size, formats, mode)
            cases += _cases(_part(size, world, cpus), subject, world, job)
        counts = {name: _calls_in(job.seconds, part, work, world) for name, part, work in cases}
        for _ in range(job.repeats):
            for name, part, work in cases:
                figures.setdefault(name, []).append(_timed(part, work, world, counts[name]))
        if world.speaks:
            gradient = sum(p.numel() * p.element_size() for p in subject.model.parameters())
            write_text_atomic(Path(job.out), json.dumps({"gradient_bytes": gradient, "seconds": figures}))


def _part(size: int, world: World, cpus: list[int]) -> Part:
    group = dist.new_group(list(range(size))) if world.size > 1 else None
    share = max(1, len(cpus) // size)
    mine = set(cpus[world.rank * share : (world.rank + 1) * share]) or set(cpus)
    return Part(size, group, world.rank < size, share, mine)


def _cases(part: Part, subject: Subject, world: World, job: Job) -> list[Case]:
    """Strong: a global batch of as many micro-batches as there are ranks in all, shared out, summed up before the
    exchange. Weak: a micro-batch per rank. Silent: the same without exchange. Exchange: of the gradients alone. Theirs:
    weak, by torchvision's googlenet in plain DDP."""
    size, network, several = part.size, cast(nn.Module, subject.network), part.size > 1
    # What DDP compiles to is cut by its buckets; a single rank, too, is compiled so, or it would lend others its code.
    wrapped = part.takes_part and world.size > 1 and (several or job.compiled)
    stepped = data_parallel(network, part.group) if wrapped else network
    dtype = next(subject.model.parameters()).dtype
    gradient = torch.zeros(sum(p.numel() for p in subject.model.parameters()), dtype=dtype, device=world.device)
    strong = job.sizes[-1] // size
    cases: list[Case] = [(f"strong {size}", part, lambda: _step(subject, stepped, strong))]
    if strong > 1 or size == 1:
        cases.append((f"weak {size}", part, lambda: _step(subject, stepped, 1)))
    if several:
        cases.append((f"silent {size}", part, lambda: _step(subject, stepped, 1, exchange=False)))
        cases.append((f"exchange {size}", part, lambda: dist.all_reduce(gradient, group=part.group)))
    if size == job.sizes[-1] and job.width == 1 and job.stem != "whiten":
        theirs = networks.theirs(job.stem, job.micro_batch_size, subject.formats, channels_last=False)
        plain = DistributedDataParallel(theirs.model, process_group=part.group) if several else theirs.model
        cases.append((f"theirs {size}", part, lambda: _step(theirs, plain, 1)))
    return cases


def _step(subject: Subject, network: nn.Module, accumulation: int, exchange: bool = True) -> None:
    images = replace(subject, network=network)
    for k in range(accumulation):
        quiet = isinstance(network, DistributedDataParallel) and not (exchange and k == accumulation - 1)
        with network.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            torch.autograd.backward(images.forward() / accumulation)
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)


def _calls_in(seconds: float, part: Part, work: Callable[[], object], world: World) -> int:
    """How many calls take `seconds`, as rank 0 sees it; after two that do not count, as DDP regroups its buckets."""
    for _ in range(2):
        _timed(part, work, world, 1)
    num = torch.tensor(max(1, math.ceil(seconds / _timed(part, work, world, 1))))
    if world.size > 1:
        dist.broadcast(num, 0)
    return int(num)


def _timed(part: Part, work: Callable[[], object], world: World, num: int) -> float:
    """Seconds of one of `num` calls, until the last of the part's ranks is done; the others wait, without computing."""
    wait = wait_for(world.device)
    if world.device.type == "cpu" and part.takes_part:
        for thread in Path("/proc/self/task").iterdir():  # OpenMP's, too
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), part.cpus)
        torch.set_num_threads(part.threads)
    if world.size > 1:
        dist.barrier()
    start = time.perf_counter()
    if part.takes_part:
        for _ in range(num):
            work()
        wait()
        if part.size > 1:
            dist.barrier(group=part.group)
    seconds = time.perf_counter() - start
    if world.size > 1:
        dist.barrier()
    return seconds / num


if __name__ == "__main__":
    run_and_exit(main)
