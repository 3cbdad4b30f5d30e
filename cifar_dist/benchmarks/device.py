"""The device under measurement, what it can do at best, and the counting of operations and bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.benchmarks.measure import Row, Table, in_turn
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.distributed import World
from cifar_dist.errors import UserError
from cifar_dist.training.precision import NumberFormat

COPY, PRODUCT = "copy, read and written", "matrix product"


def on_gpu(config: BenchConfig) -> bool:
    """Whether the device under measurement is a GPU.

    Raises:
        UserError: a GPU was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here. Check nvidia-smi, or use --device cpu.")
    return config.device != "cpu" and torch.cuda.is_available()


def num_local(gpu: bool) -> int:
    """How many processes this machine has devices for: GPUs, or processors, of which eight are enough."""
    return torch.cuda.device_count() if gpu else min(len(os.sched_getaffinity(0)), 8)


def stems(config: BenchConfig, gpu: bool) -> tuple[Stem, ...]:
    """The first layers to measure with, the most important first."""
    return config.stem or (("pooled", "cifar") if gpu else ("strided",))


def micro_batches(config: BenchConfig, gpu: bool) -> tuple[int, ...]:
    """The numbers of images in a forward pass to measure with."""
    return config.micro_batch_size or ((512,) if gpu else (128,))


def compiles(config: BenchConfig, gpu: bool) -> bool:
    """Whether compiled networks are measured."""
    return config.compile == "on" or (config.compile == "auto" and gpu)


def failure(error: Exception) -> str:
    """One line on why a case could not be measured."""
    return f"not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def wait_for(device: torch.device) -> Callable[[], None]:
    """A function that waits until `device` has done what it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


@dataclass(frozen=True)
class Ceilings:
    """The most that was measured of the device: operations/s of a matrix product, bytes/s of a copy."""

    flops: float
    bytes: float


def measure_ceilings(config: BenchConfig, world: World, formats: NumberFormat) -> tuple[Ceilings, list[Table]]:
    """Square matrix products in the number format of training, and a copy far larger than any cache."""
    device, large = world.device, world.device.type == "cuda"
    side = 8192 if large else 2048
    a, b = (torch.randn(side, side, device=device, dtype=formats.inputs) for _ in range(2))
    source = torch.ones(2**30 if large else 2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    out = torch.empty_like(a)

    def product() -> float:
        torch.mm(a, b, out=out)
        return 2 * side**3 / 1e12

    def copy() -> float:
        target.copy_(source)
        return 2 * source.numel() / 1e9

    seconds = min(config.seconds, 0.5)
    (flops,) = in_turn({PRODUCT: product}, config.repeats, seconds, wait_for(device), warm_up=2)
    (traffic,) = in_turn({COPY: copy}, config.repeats, seconds, wait_for(device), warm_up=2)
    title = f"{side} x {side}, {str(formats.inputs).removeprefix('torch.')}"
    tables = [
        Table(f"limits of the device: products of {title}", "TFLOP/s", [flops]),
        Table(f"limits of the device: copy of {source.numel() / 2**20:.0f} MiB", "GB/s", [traffic]),
    ]
    return Ceilings(max(flops.values) * 1e12, max(traffic.values) * 1e9), tables


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            self.num_operations += 1
            moved = {id(t): t for t in tree_leaves([args, kwargs, output]) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in moved.values())
        return output


@dataclass(frozen=True)
class Cost:
    """Of one step: floating-point operations of products and convolutions, bytes that its operations read and write
    when each does so by itself, and how many operations that are."""

    flops: int
    bytes: int
    num_operations: int


def cost_of(step: Callable[[], object]) -> Cost:
    """Count while `step` runs uncompiled."""
    with FlopCounterMode(display=False) as counter:
        step()
    with _Traffic() as traffic:
        step()
    return Cost(counter.get_total_flops(), traffic.bytes, traffic.num_operations)


def shares(row: Row, work_per_unit: Cost, units: int, ceilings: Ceilings, eager: bool) -> dict[str, float]:
    """Columns: what a row in units/s means in TFLOP/s and as shares of the ceilings.

    Args:
        work_per_unit: of a step of `units` units.
        eager: its operations run one by one, so that the traffic counted is the traffic there is.
    """
    flops = row.median * work_per_unit.flops / units
    columns = {"TFLOP/s": flops / 1e12, "% of product": 100 * flops / ceilings.flops}
    if eager:
        columns["% of copy"] = 100 * row.median * work_per_unit.bytes / units / ceilings.bytes
    return columns
