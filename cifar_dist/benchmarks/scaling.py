"""Part "scaling": DDP with 1 to N processes of this machine, and a simulation of many GPUs from the step of one device.

`measure` starts this module with torchrun. All ranks measure the same training step on the first 1, 2, 4 ... of them,
interleaved; rank 0 writes the seconds of each case to a file.

The simulation: gradients go around a ring of n devices (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
2009), which sends 2 (n - 1) / n of their bytes over the slowest link in 2 (n - 1) consecutive messages. With several
nodes there is one ring within each node, then one between nodes. The backward pass hides the exchange except for the
last bucket.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist import cli, files
from cifar_dist.benchmarks import baselines, report
from cifar_dist.benchmarks.baselines import TORCHVISION_NCHW, BareStep
from cifar_dist.benchmarks.measure import Row, Table, has_gpu, num_devices, processes, wait_for
from cifar_dist.benchmarks.settings import BenchConfig, as_arguments
from cifar_dist.config import ModelConfig, TrainConfig
from cifar_dist.distributed import World, data_parallel, init_distributed
from cifar_dist.errors import UserError
from cifar_dist.process import run_and_exit
from cifar_dist.training.precision import choose_precision, set_backends

SIMULATED_SIZES = (1, 8, 64, 512)


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured. Bytes/s and seconds per message of a device, within a node and between nodes.

    Args:
        backward_fraction: the part of a step's computation that hides the exchange.
        bucket_bytes: size of DDP's last bucket, which cannot be hidden; larger than these networks.
    """

    devices_per_node: int = 8
    inner_bandwidth: float = 300e9
    inner_latency: float = 5e-6
    outer_bandwidth: float = 40e9
    outer_latency: float = 15e-6
    backward_fraction: float = 2 / 3
    bucket_bytes: float = 25 * 2**20

    def describe(self) -> str:
        return (
            f"assumed: {self.devices_per_node} GPUs per node; within it {self.inner_bandwidth / 1e9:.0f} GB/s and "
            f"{self.inner_latency * 1e6:.0f} us per message, between nodes {self.outer_bandwidth / 1e9:.0f} GB/s per "
            f"GPU and {self.outer_latency * 1e6:.0f} us; the backward pass, {self.backward_fraction:.0%} of a step, "
            f"hides the exchange except for the last bucket of {self.bucket_bytes / 2**20:.0f} MiB"
        )


def exchange_seconds(gradient_bytes: float, num: int, cluster: Cluster) -> float:
    """Simulated seconds of an all-reduce over `num` devices."""

    def ring(num_bytes: float, size: int, bandwidth: float, latency: float) -> float:
        return 2 * (size - 1) * (num_bytes / size / bandwidth + latency)

    inner, nodes = min(num, cluster.devices_per_node), -(-num // cluster.devices_per_node)
    seconds = ring(gradient_bytes, inner, cluster.inner_bandwidth, cluster.inner_latency)
    return seconds + ring(gradient_bytes / inner, nodes, cluster.outer_bandwidth, cluster.outer_latency)


def step_seconds(compute_seconds: float, gradient_bytes: float, num: int, cluster: Cluster) -> float:
    """Simulated seconds of a step in which each of `num` devices computes for `compute_seconds`."""
    exchange = exchange_seconds(gradient_bytes, num, cluster)
    last = exchange_seconds(min(cluster.bucket_bytes, gradient_bytes), num, cluster)
    hidden = min(exchange - last, cluster.backward_fraction * compute_seconds)
    return compute_seconds + exchange - hidden


def measure(config: BenchConfig) -> list[Table]:
    """Strong and weak scaling, the exchange of gradients, and the simulation.

    Raises:
        UserError: the processes failed.
    """
    on_gpu = has_gpu(config)
    stem, num = config.stems(on_gpu)[0], config.micro_batch_sizes(on_gpu)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_devices(on_gpu)}",
            "-m", "cifar_dist.benchmarks.scaling", *as_arguments(replace(config, json=file)),
        ]  # fmt: skip
        # Each rank sets its number of threads. Without a value torchrun would warn.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if result.returncode:
            output = report.last_lines(result.stdout.decode(errors="replace"))
            raise UserError(f"the processes to measure ended with exit code {result.returncode}:\n{output}")
        figures = json.loads(file.read_text(encoding="utf-8"))
    seconds: dict[str, list[float]] = figures["seconds"]
    title = f"V1, {stem} stem, micro-batch {num}, {'NCCL' if on_gpu else 'gloo'}, SGD"
    return _tables(title, num, on_gpu, seconds, figures["gradient_bytes"])


def _tables(title: str, num: int, on_gpu: bool, seconds: dict[str, list[float]], gradient_bytes: int) -> list[Table]:
    def rates(images: int, case: str) -> list[float]:
        return [images / s for s in seconds[case]]

    sizes = _sizes(on_gpu)
    largest, one_rank = sizes[-1], statistics.median(seconds["weak 1"])
    strong, weak, exchange = list[Row](), list[Row](), list[Row]()
    for n in sizes:
        threads = "" if on_gpu else f" of {len(os.sched_getaffinity(0)) // n} threads"
        strong.append(Row(processes(n) + threads, rates(num * largest, f"strong {n}")))
        weak.append(Row(processes(n), rates(num * n, f"weak {n}")))
    for n in sizes[1:]:
        step, silent, alone = (
            statistics.median(seconds[f"{case} {n}"]) for case in ("weak", "no exchange", "exchange")
        )
        more = {"% of step, not hidden": 100 * (1 - silent / step), "GB/s": gradient_bytes / alone / 1e9}
        name = f"{processes(n)}, {gradient_bytes / 1e6:.1f} MB"
        exchange.append(Row(name, [1e3 * s for s in seconds[f"exchange {n}"]], more=more))
    if "torchvision" in seconds:
        weak.append(Row(f"{processes(largest)}, {TORCHVISION_NCHW}", rates(num * largest, "torchvision")))
    strong_title = f"strong: {title}, global batch {num * largest} by accumulation"
    tables = [Table(strong_title, "images/s", strong, strong[0].name)]
    if largest > 1:
        notes = [] if on_gpu else ["one process has all processors, several share them"]
        tables.append(Table(f"weak: {title} per process", "images/s", weak, weak[0].name, notes=notes))
        tables.append(Table(f"exchange of gradients: {title}", "ms", exchange, lower_is_better=True))
    return [*tables, _simulated(title, one_rank, num, on_gpu, gradient_bytes)]


def _simulated(title: str, compute_s: float, num: int, on_gpu: bool, gradient_bytes: int) -> Table:
    cluster, rows = Cluster(), []
    for n in SIMULATED_SIZES:
        step_s = step_seconds(compute_s, gradient_bytes, n, cluster)
        more = {"% efficiency": 100 * compute_s / step_s, "ms/step": 1e3 * step_s}
        rows.append(Row(processes(n), [num * n / step_s], more=more))
    caveat = "" if on_gpu else ", on a CPU, so this does not show the efficiency of GPUs"
    notes = [f"SIMULATION: only the step of one device was measured ({1e3 * compute_s:.1f} ms{caveat})"]
    return Table(f"simulated, weak: {title}", "images/s", rows, rows[0].name, notes=[*notes, cluster.describe()])


def _sizes(on_gpu: bool) -> list[int]:
    """Numbers of processes to measure: those that divide the number of devices, and so the global batch."""
    return [n for n in range(1, num_devices(on_gpu) + 1) if num_devices(on_gpu) % n == 0]


# On each rank


@dataclass
class _Case:
    """`work` is timed on the first `size` ranks, which form `group` (None: all)."""

    name: str
    size: int
    group: Any
    work: Callable[[], object]


def main() -> None:
    config = cli.parse(BenchConfig, sys.argv[1:], "bench")
    with init_distributed(config.device) as world:
        on_gpu = world.device.type == "cuda"
        precision = choose_precision(config.precision, world.device)
        set_backends(TrainConfig(), False, world.device)
        stem, num = config.stems(on_gpu)[0], config.micro_batch_sizes(on_gpu)[0]
        mode = "default" if config.compiles(on_gpu) else None
        cases: list[_Case] = []
        for size in _sizes(on_gpu):
            # A network for each size, because DDP adds hooks to its parameters.
            step = baselines.project_step(ModelConfig(stem=stem, width=config.width), num, precision, mode)
            cases += _cases(step, size, world, mode is not None)
        if baselines.has_torchvision_counterpart(stem, config.width):
            other = baselines.torchvision_step(stem, num, precision)
            network = DistributedDataParallel(other.model) if world.size > 1 else other.model
            cases.append(_Case("torchvision", world.size, None, partial(_step, other, network, 1)))
        counts = {case.name: _calls_in(config.seconds, case, world) for case in cases}
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        for _ in range(config.repeats):
            for case in cases:
                seconds[case.name].append(_timed(case, world, counts[case.name]))
        seconds[f"weak {world.size}"] = seconds[f"strong {world.size}"]  # the same, as it accumulates nothing
        if world.is_main and config.json is not None:
            gradient_bytes = sum(p.numel() * p.element_size() for p in step.model.parameters())
            files.write_json(config.json, {"gradient_bytes": gradient_bytes, "seconds": seconds})


def _cases(step: BareStep, size: int, world: World, compiled: bool) -> list[_Case]:
    """Cases to time on the first `size` ranks.

    strong: a global batch of one micro-batch per rank of the whole job, by accumulation. weak: a micro-batch per rank.
    no exchange: weak without all-reduce. exchange: only the all-reduce of the gradients.
    """
    group: Any = dist.new_group(list(range(size))) if world.size > 1 else None
    network = cast(nn.Module, step.network)
    # torch.compile splits graphs at DDP's buckets. Wrap a single rank, too: otherwise its unsplit compiled code would
    # be reused for the others.
    if world.rank < size and world.size > 1 and (size > 1 or compiled):
        network = data_parallel(network, group)
    works: dict[str, Callable[[], object]] = {"strong": partial(_step, step, network, world.size // size)}
    if size < world.size:
        works["weak"] = partial(_step, step, network, 1)
    if size > 1:
        gradient = torch.cat([torch.zeros_like(p).flatten() for p in step.model.parameters()])
        works["no exchange"] = partial(_step, step, network, 1, exchange=False)
        works["exchange"] = lambda: dist.all_reduce(gradient, group=group)
    return [_Case(f"{name} {size}", size, group, work) for name, work in works.items()]


def _step(step: BareStep, network: nn.Module, accumulation: int, exchange: bool = True) -> None:
    step = replace(step, network=network)
    for k in range(accumulation):
        silent = isinstance(network, DistributedDataParallel) and not (exchange and k == accumulation - 1)
        with network.no_sync() if silent else nullcontext():  # type: ignore[operator]
            torch.autograd.backward(step.loss() / accumulation)
    step.optimizer.step()
    step.optimizer.zero_grad()


def _calls_in(seconds: float, case: _Case, world: World) -> int:
    """Number of calls that take `seconds` on rank 0; the same on all ranks."""
    for _ in range(2):  # the first compiles, after the first DDP rebuilds its buckets
        _timed(case, world, 1)
    num = torch.tensor(max(1, math.ceil(seconds / _timed(case, world, 1))))
    if world.size > 1:
        dist.broadcast(num, 0)
    return int(num)


def _timed(case: _Case, world: World, num: int) -> float:
    """Seconds of one of `num` calls, until the last rank of the case has finished. The other ranks wait, idle."""
    takes_part = world.rank < case.size
    if world.device.type == "cpu" and takes_part:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // case.size))
    if world.size > 1:
        dist.barrier()
    start = time.perf_counter()
    if takes_part:
        for _ in range(num):
            case.work()
        wait_for(world.device)()
        if case.size > 1:
            dist.barrier(group=case.group)
    seconds = time.perf_counter() - start
    if world.size > 1:
        dist.barrier()
    return seconds / num


if __name__ == "__main__":
    run_and_exit(main)
