"""Part "scaling": DDP with 1 to N processes of this machine, and a simulation of many GPUs from the step of one device.

`measure` starts a process per device, as torchrun does. All ranks measure the same training step on the first n
of them, for each divisor n of their number, interleaved. Then they measure the steps of `cifar_dist.train` with
train.exact_sum on and off, interleaved.

The simulation: gradients go around a ring of n devices (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
2009), which sends 2 (n - 1) / n of their bytes over the slowest link in 2 (n - 1) consecutive messages. With several
nodes there is one ring within each node, then one between nodes. The exchange begins when the backward pass has ended,
since the gradient is one tensor (training/flat_network.py).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import TORCHVISION_NCHW, BareStep
from cifar_dist.benchmarks.measure import Case, Row, Table, interleaved, torch_as_in_training
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import Config, ModelConfig, TrainConfig
from cifar_dist.distributed import World, data_parallel
from cifar_dist.environment import num_processors
from cifar_dist.errors import UserError
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import Precision
from cifar_dist.training.schedule import Step
from cifar_dist.training.train_step import TrainStep

_Network = Literal["inception_v1", "inception_v2"]
_EXACT_BYTES = 8  # of a gradient element that is exchanged with train.exact_sum on: int64
_NETWORKS: tuple[_Network, ...] = ("inception_v1", "inception_v2")
_MODES: tuple[Literal["off", "on"], ...] = ("off", "on")


class _Measured(NamedTuple):
    """On the ranks of this machine."""

    steps: list[Row]  # images/s
    exchanges: list[Row]  # GB/s
    exact_sums: dict[_Network, list[Row]]  # images/s with train.exact_sum off and on
    num_parameters: int
    element_bytes: int  # of a gradient


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured. GB/s and microseconds per message of a device, within a node and between nodes."""

    gpus_per_node: int = 8
    inner_gb_per_s: float = 300.0
    inner_us: float = 5.0
    outer_gb_per_s: float = 40.0
    outer_us: float = 15.0


def exchange_seconds(gradient_bytes: float, num: int, cluster: Cluster) -> float:
    """Simulated seconds of an all-reduce over `num` devices."""

    def ring(num_bytes: float, size: int, gb_per_s: float, message_us: float) -> float:
        return 2 * (size - 1) * (num_bytes / size / gb_per_s / 1e9 + message_us / 1e6)

    inner, nodes = min(num, cluster.gpus_per_node), -(-num // cluster.gpus_per_node)
    seconds = ring(gradient_bytes, inner, cluster.inner_gb_per_s, cluster.inner_us)
    return seconds + ring(gradient_bytes / inner, nodes, cluster.outer_gb_per_s, cluster.outer_us)


def measure(config: BenchConfig) -> list[Table]:
    """Training steps and the exchange of their gradients, and the simulation.

    Raises:
        UserError: a rank failed.
    """
    on_gpu, num = config.device == "cuda", config.micro_batch_size[0]
    num_devices = torch.cuda.device_count() if on_gpu else min(num_processors(), 8)
    rendezvous: Any = {"run_id": "bench", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    launch = LaunchConfig(1, 1, num_devices, max_restarts=0, **rendezvous)
    try:
        found: _Measured = elastic_launch(launch, _measure_on_rank)(config)[0]
    except SignalException as stopped:  # torch's handlers raise it
        raise KeyboardInterrupt from stopped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message  # a dictionary, or text if a signal ended the rank
        reason = message["message"] if isinstance(message, dict) else message
        raise UserError(f"rank {rank} of the measurement failed: {reason}") from None
    title = f"V1, {config.stem[0]} stem, micro-batch {num}, {'NCCL' if on_gpu else 'gloo'}, SGD"
    notes = ["strong scaling: rows with one global batch, by accumulation; weak: rows with a micro-batch per process"]
    if not on_gpu:
        notes.append("one process has all processors, several share them")
    tables = [Table(title, "images/s", found.steps, found.steps[0].name, notes)]
    if found.exchanges:
        size = f"{found.element_bytes * found.num_parameters / 1e6:.1f} MB"
        tables.append(Table(f"exchange of {size} of gradients: {title}", "GB/s", found.exchanges))
    for name, rows in found.exact_sums.items():
        tables.append(Table(f"{name}, {config.stem[0]} stem, whole step with Muon", "images/s", rows, rows[0].name))
    return [*tables, _simulated(title, num, found, on_gpu)]


def _processes(num: int) -> str:
    return f"{num} process{'es' if num > 1 else ''}"


def _simulated(title: str, num: int, found: _Measured, on_gpu: bool) -> Table:
    """From the speed of one process with micro-batches of `num` images."""
    cluster, compute_s, rows = Cluster(), num / found.steps[0].median, list[Row]()
    for n in (1, 8, 64, 512):
        exact = compute_s + exchange_seconds(_EXACT_BYTES * found.num_parameters, n, cluster)
        floats = compute_s + exchange_seconds(found.element_bytes * found.num_parameters, n, cluster)
        more = {"% efficiency": 100 * compute_s / exact, "% with exact_sum off": 100 * compute_s / floats}
        rows.append(Row(_processes(n), [num * n / exact], more))
    caveat = "" if on_gpu else ", on a CPU, so this does not show the efficiency of GPUs"
    assumed = ", ".join(f"{name} {value:.3g}" for name, value in vars(cluster).items()).replace("_", " ")
    notes = [
        f"SIMULATION: only the step of one device was measured ({1e3 * compute_s:.1f} ms{caveat})",
        f"assumed: {assumed}; no part of the exchange overlaps with the backward pass",
        "efficiency: with exact_sum on, without the time that converts gradients to integers",
    ]
    return Table(f"simulated, weak: {title}", "images/s", rows, rows[0].name, notes)


def _measure_on_rank(config: BenchConfig) -> _Measured:
    """On each rank: what was measured, the same on all ranks."""
    os.dup2(2, 1)  # gloo prints to stdout, which is for the tables
    model, num = ModelConfig(stem=config.stem[0], width=config.width), config.micro_batch_size[0]
    steps, exchanges = dict[str, Case](), dict[str, Case]()
    with torch_as_in_training(config) as (world, precision):
        for size in (n for n in range(1, world.size + 1) if world.size % n == 0):  # so they divide the global batch
            # A network for each size, because DDP adds hooks to its parameters.
            step = baselines.project_step(model, num, precision, config.compile == "on")
            _add_cases(step, size, world, steps, exchanges)
        num_parameters = sum(p.numel() for p in step.model.parameters())
        if baselines.has_torchvision_counterpart(model.stem, config.width):
            other = baselines.torchvision_step(model.stem, num, precision)
            if world.size > 1:
                other.network = nn.parallel.DistributedDataParallel(other.model)
            name = f"{_processes(world.size)}, global batch {world.size * num}, {TORCHVISION_NCHW}"
            steps[name] = world.size * num, partial(_on_ranks, world.size, world, other)
        rows = interleaved({**steps, **exchanges}, config)
        exact_sums = {name: _with_and_without_exact_sum(name, config, world, precision) for name in _NETWORKS}
    return _Measured(rows[: len(steps)], rows[len(steps) :], exact_sums, num_parameters, precision.parameters.itemsize)


def _with_and_without_exact_sum(name: _Network, config: BenchConfig, world: World, precision: Precision) -> list[Row]:
    """Steps of `cifar_dist.train` on all ranks, a micro-batch of black images each; they share all processors."""
    num, cases = config.micro_batch_size[0], dict[str, Case]()
    for mode in _MODES:
        settings = Config(
            model=ModelConfig(name=name, stem=config.stem[0], width=config.width),
            train=TrainConfig(
                batch_size=num * world.size, micro_batch_size=num, exact_sum=mode, compile=config.compile,
                precision=precision.name,
            ),
        )  # fmt: skip
        step, batches = TrainStep(settings, world, precision), baselines.blank_batches(num, world.device)
        step.prepare()
        work = partial(_on_ranks, world.size, world, partial(step.run, Step(0, 0.0), batches, Metrics(world)))
        cases[f"{_processes(world.size)}, exact_sum {mode}"] = num * world.size, work
    return interleaved(cases, config)


def _add_cases(step: BareStep, size: int, world: World, steps: dict[str, Case], exchanges: dict[str, Case]) -> None:
    """Add what to time on the first `size` ranks: training steps, and an all-reduce of their gradients.

    The steps have a micro-batch for each of these ranks, or for each rank of the whole job, by accumulation.
    """
    group: Any = dist.new_group(list(range(size))) if world.size > 1 else None
    # torch.compile splits graphs at DDP's buckets. Wrap a single rank, too: otherwise its unsplit compiled code would
    # be reused for the others.
    if world.rank < size and world.size > 1 and (size > 1 or step.network is not step.model):
        step.network = data_parallel(step.network, group)
    name, batch_size = _processes(size), size * len(step.labels)
    for accumulation in sorted({1, world.size // size}):
        images = accumulation * batch_size
        steps[f"{name}, global batch {images}"] = images, partial(_on_ranks, size, world, partial(step, accumulation))
    if size > 1:
        silent = partial(_on_ranks, size, world, partial(step, exchange=False))
        steps[f"{name}, global batch {batch_size}, gradients not exchanged"] = batch_size, silent
        gradient = torch.cat([torch.zeros_like(p).flatten() for p in step.model.parameters()])
        exchange = partial(dist.all_reduce, gradient, group=group)
        exchanges[name] = gradient.nbytes / 1e9, partial(_on_ranks, size, world, exchange)


def _on_ranks(size: int, world: World, work: Callable[[], object]) -> None:
    """Do `work` on the first `size` ranks, which share the processors; the other ranks do nothing."""
    if world.rank < size:
        if world.device.type == "cpu":
            torch.set_num_threads(num_processors(shared_by=size))
        work()
