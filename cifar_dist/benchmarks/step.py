"""Part "step": augmentation and training step, against torchvision's googlenet and the limits of the device."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import TORCHVISION_NCHW, TORCHVISION_NHWC, BareStep
from cifar_dist.benchmarks.loader import take
from cifar_dist.benchmarks.measure import Case, Table, interleaved, torch_as_in_training
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.config import AugmentConfig, ModelConfig
from cifar_dist.data import augment
from cifar_dist.models.fused import can_use_kernels
from cifar_dist.models.network import InceptionNetwork
from cifar_dist.training.precision import Precision, compile_for_training


def measure(config: BenchConfig) -> list[Table]:
    # By default torch runs further networks uncompiled after it has compiled the same code eight times.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1024
    with torch_as_in_training(config) as (_, precision):
        tables = _limits(config, precision.inputs)
        limits = [max(table.rows[0].values) for table in tables]
        tables.append(_augmentation(config, precision))
        for stem, num in itertools.product(config.stem, config.micro_batch_size):
            tables.append(_networks(config, precision, stem, num, limits))
        return tables


def _limits(config: BenchConfig, dtype: torch.dtype) -> list[Table]:
    """Measure a product of square matrices in `dtype`, and a copy that is much larger than any cache."""
    side, size = (8192, 2**30) if config.device == "cuda" else (2048, 2**27)
    a, b = (torch.randn(side, side, device=config.device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, device=config.device, dtype=torch.uint8)
    product, target = torch.empty_like(a), torch.empty_like(source)
    cases: dict[str, Case] = {
        "matrix product": (2 * side**3 / 1e12, partial(torch.mm, a, b, out=product)),
        "copy, read and written": (2 * size / 1e9, partial(target.copy_, source)),
    }
    rows = interleaved(cases, config)
    products = f"limits of the device: products of {side} x {side}, {str(dtype).removeprefix('torch.')}"
    copies = f"limits of the device: copy of {size / 2**20:.0f} MiB"
    return [Table(products, "TFLOP/s", rows[:1]), Table(copies, "GB/s", rows[1:])]


def _augmentation(config: BenchConfig, precision: Precision) -> Table:
    """Sampling of the parameters, flip, translation, cutout, normalisation and receipt of a batch in memory."""
    num, dtype = config.micro_batch_size[0], precision.inputs
    batches, notes = baselines.blank_batches(num, torch.device(config.device)), list[str]()
    eager = partial(take, batches, AugmentConfig(), dtype)
    cases: dict[str, Case] = {
        "eager": (num, eager),
        "normalised only": (num, lambda: augment.normalize(next(batches)[1].images, dtype)),
    }
    if config.compile == "on":
        compiled = partial(eager, compile_for_training(augment.augment_batch))
        if _attempt("compiled", compiled, notes):
            cases["compiled"] = (num, compiled)
    rows = interleaved(cases, config)
    return Table(f"augmentation, batches of {num}, {precision.name}", "images/s", rows, "eager", notes=notes)


def _networks(config: BenchConfig, precision: Precision, stem: Stem, num: int, limits: Sequence[float]) -> Table:
    """Training steps of the networks that can be built, in relation to the `limits` of the device, TFLOP/s and GB/s."""
    notes, steps, costs = list[str](), dict[str, BareStep](), dict[str, tuple[int, int]]()

    def add(name: str, create: Callable[[], BareStep]) -> None:
        def build() -> None:
            step = create()
            network, step.network = step.network, step.model
            costs[name] = cost_of(step)
            step.network = network
            for _ in range(1 if network is step.model else 3):  # the second call records CUDA graphs, the third replays
                step()
            steps[name] = step

        _attempt(name, build, notes)

    for version, merged in itertools.product(("v1", "v2"), ("off", "on")):
        name = f"{version.upper()}, {'1x1 merged' if merged == 'on' else 'plain'}"
        values: Any = {"name": f"inception_{version}", "merge_1x1": merged}
        create = partial(baselines.project_step, ModelConfig(stem=stem, width=config.width, **values), num, precision)
        add(name, create)
        if config.compile == "on" and (version == "v1" or merged == "off"):  # not all four, because it takes long
            add(f"{name}, compiled", partial(create, compiled=True))
            if config.device == "cuda" and name == "V1, 1x1 merged":
                add(f"{name}, compiled, CUDA graphs", partial(create, compiled=True, cuda_graphs=True))
                add(f"{name}, compiled, static launcher", partial(create, compiled=True, static_launcher=True))
    default = ModelConfig(stem=stem, width=config.width)
    create = partial(baselines.project_step, default, num, precision, compiled=config.compile == "on", muon=True)
    add("V1, as trained by default, with Muon", create)
    if baselines.has_torchvision_counterpart(stem, config.width):
        add(TORCHVISION_NCHW, partial(baselines.torchvision_step, stem, num, precision))
        add(TORCHVISION_NHWC, partial(baselines.torchvision_step, stem, num, precision, channels_last=True))
    rows = interleaved({name: (num, step) for name, step in steps.items()}, config)
    for row in rows:
        step, (flops, num_bytes), steps_per_second = steps[row.name], costs[row.name], row.median / num
        row.more["TFLOP/s"] = steps_per_second * flops / 1e12
        row.more["% of product"] = 100 * row.more["TFLOP/s"] / limits[0]
        machine_code = isinstance(step.model, InceptionNetwork) and can_use_kernels(step.images)
        if step.network is step.model and not machine_code:  # both move other bytes than the operations
            row.more["% of copy"] = 100 * steps_per_second * num_bytes / 1e9 / limits[1]
    if config.width != 1:
        notes.append(f"width {config.width:g}; without torchvision's googlenet, which has no width")
    notes.append("% of copy: the bytes that each operation reads and writes, including those served by a cache")
    notes.append("torchvision's with its defaults: eager, torch's SGD, dropout, batch-norm statistics kept")
    title = f"{stem} stem, micro-batch {num}, {precision.name}, SGD"
    reference = TORCHVISION_NCHW if TORCHVISION_NCHW in steps else next(iter(steps), "")
    return Table(title, "images/s", rows, reference, notes=notes)


def _attempt(name: str, work: Callable[[], object], notes: list[str]) -> bool:
    """Whether `work` succeeds. If it does not, such as without memory or compiler, `notes` gets the reason."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever torch raises
        reason = (str(error).splitlines() or [""])[0][:160]
        notes.append(f"{name}: not measured: {type(error).__name__}: {reason}")
        torch.cuda.empty_cache()  # without a GPU, this does nothing
        return False
    return True


class _ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the bytes that each operation inside reads and writes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):  # these move nothing
            tensors = {id(t): t for t in tree_leaves([args, kwargs, output]) if isinstance(t, Tensor)}
            self.total += sum(t.numel() * t.element_size() for t in tensors.values())
        return output


def cost_of(step: Callable[[], object]) -> tuple[int, int]:
    """Flop of products and convolutions, and bytes moved by all operations, of `step`, which must not be compiled."""
    step()  # creates the state of the optimizer
    counter = _ByteCounter()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as flops, counter:
        step()
    return flops.get_total_flops(), counter.total
