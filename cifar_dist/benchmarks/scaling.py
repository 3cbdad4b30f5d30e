"""Part "scaling": DDP with 1 to N processes of this machine, and a simulation of many GPUs from the step of one device.

`measure` starts a process per device, as torchrun does. All ranks measure the same training step on the first n
of them, for each divisor n of their number, interleaved.

The simulation: gradients go around a ring of n devices (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
2009), which sends 2 (n - 1) / n of their bytes over the slowest link in 2 (n - 1) consecutive messages. With several
nodes there is one ring within each node, then one between nodes. The backward pass hides the exchange except for the
last bucket.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import TORCHVISION_NCHW, BareStep
from cifar_dist.benchmarks.measure import Row, Table, Work, interleaved, torch_as_in_training
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import ModelConfig
from cifar_dist.distributed import World, data_parallel
from cifar_dist.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured. Bytes/s and seconds per message of a device, within a node and between nodes."""

    devices_per_node: int = 8
    inner_bandwidth: float = 300e9
    inner_latency: float = 5e-6
    outer_bandwidth: float = 40e9
    outer_latency: float = 15e-6
    backward_fraction: float = 2 / 3  # of a step's computation; hides the exchange
    bucket_bytes: float = 25 * 2**20  # DDP's last bucket cannot be hidden; these networks fit into one

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
        UserError: a rank failed.
    """
    on_gpu, num = config.device == "cuda", config.micro_batch_size[0]
    rendezvous: Any = {"run_id": "bench", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    launch = LaunchConfig(1, 1, _sizes(on_gpu)[-1], max_restarts=0, **rendezvous)
    try:
        seconds, gradient_bytes = elastic_launch(launch, _measure_on_rank)(config)[0]
    except SignalException as stopped:  # torch's handlers raise it
        raise KeyboardInterrupt from stopped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message  # a dictionary, or text if a signal ended the rank
        reason = message["message"] if isinstance(message, dict) else message
        raise UserError(f"rank {rank} of the measurement failed: {reason}") from None
    title = f"V1, {config.stem[0]} stem, micro-batch {num}, {'NCCL' if on_gpu else 'gloo'}, SGD"
    return _tables(title, num, on_gpu, seconds, gradient_bytes)


def _sizes(on_gpu: bool) -> list[int]:
    """Numbers of processes to measure: those that divide the number of devices, and so the global batch.

    The devices are the GPUs of this machine, or its processors, at most eight.
    """
    num_devices = torch.cuda.device_count() if on_gpu else min(len(os.sched_getaffinity(0)), 8)
    return [n for n in range(1, num_devices + 1) if num_devices % n == 0]


def _tables(title: str, num: int, on_gpu: bool, seconds: dict[str, list[float]], gradient_bytes: int) -> list[Table]:
    """Tables from the seconds of each case of `_cases`, with micro-batches of `num` images."""

    def row(name: str, images: int, case: str) -> Row:
        return Row(name, [images / s for s in seconds[case]])

    medians = {case: statistics.median(values) for case, values in seconds.items()}
    names = {n: _processes(n) for n in _sizes(on_gpu)}
    largest, exchange = max(names), list[Row]()
    strong = [row(name, num * largest, f"strong {n}") for n, name in names.items()]
    weak = [row(name, num * n, f"weak {n}") for n, name in names.items()]
    if "torchvision" in seconds:
        weak.append(row(f"{names[largest]}, {TORCHVISION_NCHW}", num * largest, "torchvision"))
    for n in list(names)[1:]:
        not_hidden = 1 - medians[f"no exchange {n}"] / medians[f"weak {n}"]
        more = {"% of step, not hidden": 100 * not_hidden, "GB/s": gradient_bytes / medians[f"exchange {n}"] / 1e9}
        name = f"{names[n]}, {gradient_bytes / 1e6:.1f} MB"
        exchange.append(Row(name, [1e3 * s for s in seconds[f"exchange {n}"]], more=more))
    notes = [] if on_gpu else ["one process has all processors, several share them"]
    strong_title = f"strong: {title}, global batch {num * largest} by accumulation"
    tables = [Table(strong_title, "images/s", strong, names[1], notes=notes)]
    if largest > 1:
        tables.append(Table(f"weak: {title} per process", "images/s", weak, names[1], notes=notes))
        tables.append(Table(f"exchange of gradients: {title}", "ms", exchange, lower_is_better=True))
    return [*tables, _simulated(title, medians["weak 1"], num, on_gpu, gradient_bytes)]


def _processes(num: int) -> str:
    return f"{num} process{'es' if num > 1 else ''}"


def _simulated(title: str, compute_s: float, num: int, on_gpu: bool, gradient_bytes: int) -> Table:
    cluster, rows = Cluster(), []
    for n in (1, 8, 64, 512):
        step_s = step_seconds(compute_s, gradient_bytes, n, cluster)
        more = {"% efficiency": 100 * compute_s / step_s, "ms/step": 1e3 * step_s}
        rows.append(Row(_processes(n), [num * n / step_s], more=more))
    caveat = "" if on_gpu else ", on a CPU, so this does not show the efficiency of GPUs"
    notes = [f"SIMULATION: only the step of one device was measured ({1e3 * compute_s:.1f} ms{caveat})"]
    return Table(f"simulated, weak: {title}", "images/s", rows, rows[0].name, notes=[*notes, cluster.describe()])


def _measure_on_rank(config: BenchConfig) -> tuple[dict[str, list[float]], int]:
    """On each rank: seconds of a call of each case, the same on all ranks; bytes of the gradients."""
    os.dup2(2, 1)  # gloo prints to stdout, which is for the tables
    model, num = ModelConfig(stem=config.stem[0], width=config.width), config.micro_batch_size[0]
    with torch_as_in_training(config) as (world, precision):
        cases = dict[str, Work]()
        for size in _sizes(config.device == "cuda"):
            # A network for each size, because DDP adds hooks to its parameters.
            step = baselines.project_step(model, num, precision, config.compile == "on")
            cases |= _cases(step, size, world)
        gradient_bytes = sum(p.numel() * p.element_size() for p in step.model.parameters())
        if baselines.has_torchvision_counterpart(model.stem, config.width):
            other = baselines.torchvision_step(model.stem, num, precision)
            if world.size > 1:
                other.network = nn.parallel.DistributedDataParallel(other.model)
            cases["torchvision"] = partial(_on_ranks, world.size, world, other)
        rows = interleaved(cases, config)
    seconds = {row.name: [1 / calls_per_s for calls_per_s in row.values] for row in rows}
    seconds[f"weak {world.size}"] = seconds[f"strong {world.size}"]  # the same, as it accumulates nothing
    return seconds, gradient_bytes


def _cases(step: BareStep, size: int, world: World) -> dict[str, Work]:
    """Cases to time on the first `size` ranks.

    strong: a global batch of one micro-batch per rank of the whole job, by accumulation. weak: a micro-batch per rank.
    no exchange: weak without all-reduce. exchange: only the all-reduce of the gradients.
    """
    group: Any = dist.new_group(list(range(size))) if world.size > 1 else None
    # torch.compile splits graphs at DDP's buckets. Wrap a single rank, too: otherwise its unsplit compiled code would
    # be reused for the others.
    if world.rank < size and world.size > 1 and (size > 1 or step.network is not step.model):
        step.network = data_parallel(step.network, group)
    works: dict[str, Callable[[], object]] = {"strong": partial(step, world.size // size)}
    if size < world.size:
        works["weak"] = step
    if size > 1:
        gradient = torch.cat([torch.zeros_like(p).flatten() for p in step.model.parameters()])
        works["no exchange"] = partial(step, exchange=False)
        works["exchange"] = lambda: dist.all_reduce(gradient, group=group)
    return {f"{name} {size}": partial(_on_ranks, size, world, work) for name, work in works.items()}


def _on_ranks(size: int, world: World, work: Callable[[], object]) -> float:
    """Do `work` on the first `size` ranks, which share the processors; the other ranks do nothing. Returns 1 call."""
    if world.rank < size:
        if world.device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
        work()
    return 1.0
