"""Part "step": augmentation and training step, against torchvision's googlenet and the limits of the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch._dynamo.config as dynamo

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import TORCHVISION_NCHW, TORCHVISION_NHWC, BareStep
from cifar_dist.benchmarks.measure import (
    Cost,
    Limits,
    Row,
    Table,
    Work,
    cost_of,
    failure,
    interleaved,
    measure_limits,
    threads,
    wait_for,
)
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.config import AugmentConfig, ModelConfig, TrainConfig
from cifar_dist.data import augment
from cifar_dist.distributed import init_distributed
from cifar_dist.training.precision import Precision, choose_precision, set_backends

_SMALL = 128  # images in a micro-batch for which CUDA graphs are measured
_VERSIONS = {"V1": "inception_v1", "V2": "inception_v2"}


@dataclass(frozen=True)
class _Setting:
    """What the rows of a table have in common."""

    stem: Stem
    num_images: int
    compiled: bool
    config: BenchConfig
    device: torch.device
    precision: Precision


def measure(config: BenchConfig) -> list[Table]:
    with init_distributed(config.device) as world:
        precision = choose_precision(config.precision, world.device)
        set_backends(TrainConfig(), False, world.device)
        on_gpu = world.device.type == "cuda"
        # By default torch runs further networks uncompiled after it has compiled the same code eight times.
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1024
        limits, tables = measure_limits(config, world.device, precision.inputs)
        stems, sizes = config.stems(on_gpu), config.micro_batch_sizes(on_gpu)
        first = _Setting(stems[0], sizes[0], config.compiles(on_gpu), config, world.device, precision)
        tables.append(_augmentation(first))
        for stem, num in product(stems, sizes):
            tables.append(_networks(replace(first, stem=stem, num_images=num), limits))
        if on_gpu and not config.micro_batch_size:
            tables.append(_networks(replace(first, num_images=_SMALL), limits, versions=("V1",)))
        return [*tables, _step_in_parts(first)]


def _augmentation(setting: _Setting) -> Table:
    """Sampling of the parameters, flip, translation, cutout and normalisation of a batch in memory."""
    num, device, dtype = setting.num_images, setting.device, setting.precision.inputs
    images = torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    indices, augmentation = torch.arange(num, device=device), AugmentConfig()

    def work(apply: Callable[..., torch.Tensor]) -> float:
        apply(images, augment.sample_params(indices, 0, 0, augmentation), augmentation.cutout, dtype)
        return float(num)

    def normalize() -> float:
        augment.normalize(images, dtype)
        return float(num)

    cases: dict[str, Work] = {"eager": partial(work, augment.apply), "normalised only": normalize}
    notes = []
    if setting.compiled:
        cases["compiled"] = partial(work, torch.compile(augment.apply, dynamic=False))
        try:
            cases["compiled"]()
        except Exception as error:  # noqa: BLE001 - such as no C++ compiler
            notes.append(f"compiled: {failure(error)}")
            del cases["compiled"]
    rows = interleaved(cases, setting.config.repeats, setting.config.seconds / 2, wait_for(device))
    title = f"augmentation, batches of {num}, {setting.precision.name}{threads(device)}"
    return Table(title, "images/s", rows, "eager", notes=notes)


def _networks(setting: _Setting, limits: Limits, versions: tuple[str, ...] = ("V1", "V2")) -> Table:
    """Training steps of the networks that can be built; a note says why another one cannot."""
    notes, steps, costs = [], dict[str, BareStep](), dict[str, Cost]()
    for name, build in _builders(setting, versions):
        try:
            step = build()
            costs[name] = cost_of(replace(step, network=step.model))  # uncompiled
            for _ in range(2):
                step()
            steps[name] = step
        except Exception as error:  # noqa: BLE001 - such as no memory or no compiler
            notes.append(f"{name}: {failure(error)}")
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    config, num, wait = setting.config, setting.num_images, wait_for(setting.device)
    rows = interleaved(steps, config.repeats, config.seconds, wait)
    for row in rows:
        steps_per_second, cost = row.median / num, costs[row.name]
        row.more["TFLOP/s"] = steps_per_second * cost.flops / 1e12
        row.more["% of product"] = 100 * steps_per_second * cost.flops / limits.flops
        if steps[row.name].network is steps[row.name].model:  # compiled operations move other bytes
            row.more["% of copy"] = 100 * steps_per_second * cost.bytes / limits.bytes
            row.more["operations"] = cost.num_operations
    if config.width != 1:
        notes.append(f"width {config.width:g}; without torchvision's googlenet, which has no width")
    notes.append("% of copy: the bytes that each operation reads and writes, including those served by a cache")
    notes.append("torchvision's with its defaults: eager, torch's SGD, dropout, batch-norm statistics kept")
    title = f"{setting.stem} stem, micro-batch {num}, {setting.precision.name}{threads(setting.device)}, SGD"
    reference = TORCHVISION_NCHW if TORCHVISION_NCHW in steps else next(iter(steps), "")
    return Table(title, "images/s", rows, reference, notes=notes)


def _builders(setting: _Setting, versions: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], BareStep]]]:
    """Names and builders of the networks to compare.

    Compiled, which takes long, are V1 with and without merged 1x1 and V2 without.
    """
    num, precision, width = setting.num_images, setting.precision, setting.config.width
    graphs = num <= _SMALL and precision.device_type == "cuda"
    for version, merged in product(versions, ("off", "on")):
        name: Any = _VERSIONS[version]
        kind = f"{version}, 1x1 merged" if merged == "on" else f"{version}, plain"
        model = ModelConfig(name=name, stem=setting.stem, width=width, merge_1x1=merged)  # type: ignore[arg-type]
        build = partial(baselines.project_step, model, num, precision)
        yield kind, build
        if setting.compiled and (version == "V1" or merged == "off"):
            yield f"{kind}, compiled", partial(build, "default")
        if setting.compiled and graphs and merged == "off":
            yield f"{kind}, CUDA graphs", partial(build, "reduce-overhead")
    if baselines.has_torchvision_counterpart(setting.stem, width):
        for kind, channels_last in ((TORCHVISION_NCHW, False), (TORCHVISION_NHWC, True)):
            yield kind, partial(baselines.torchvision_step, setting.stem, num, precision, channels_last)


def _step_in_parts(setting: _Setting) -> Table:
    """Forward, backward and optimizer of V1."""
    rows = []
    for muon in (False, True):
        model = ModelConfig(stem=setting.stem, width=setting.config.width)
        mode = "default" if setting.compiled else None
        step = baselines.project_step(model, setting.num_images, setting.precision, mode, muon)
        for _ in range(3):
            step()
        times = [step.seconds_by_part(wait_for(setting.device)) for _ in range(max(setting.config.repeats, 3))]
        forward, backward, optimizer = ([1e3 * seconds for seconds in column] for column in zip(*times, strict=True))
        if not muon:
            rows += [Row("forward", forward), Row("backward", backward)]
        rows.append(Row("Muon and SGD" if muon else "SGD", optimizer))
    total = sum(statistics.median(row.values) for row in rows[:3])
    rows = [replace(row, more={"% of step": 100 * row.median / total}) for row in rows[:3]] + rows[3:]
    title = f"a step of V1 in parts, {setting.stem} stem, micro-batch {setting.num_images}"
    return Table(title, "ms", rows, lower_is_better=True)
