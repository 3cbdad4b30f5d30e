"""A training step: networks, stems, micro-batches, memory orders; against torchvision's googlenet and the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from cifar_dist.benchmarks import networks
from cifar_dist.benchmarks.device import (
    Ceilings,
    Cost,
    compiles,
    cost_of,
    failure,
    measure_ceilings,
    micro_batches,
    shares,
    stems,
    wait_for,
)
from cifar_dist.benchmarks.measure import Row, Table, in_turn
from cifar_dist.benchmarks.networks import THEIRS, THEIRS_LAST, Subject
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.config import ModelConfig, TrainConfig
from cifar_dist.distributed import World, joined
from cifar_dist.training.precision import NumberFormat, number_format, set_backends

V1, V2 = "V1", "V2"
_NAMES = {V1: "inception_v1", V2: "inception_v2"}
_SMALL = 128  # images in a micro-batch


@dataclass(frozen=True)
class Setting:
    stem: Stem
    num_images: int
    width: float
    compiled: bool


def measure(config: BenchConfig) -> list[Table]:
    """All settings that `config` asks for, and what the device can do at best."""
    with joined(config.device) as world:
        formats = number_format(config.precision, world.device)
        set_backends(TrainConfig(), deterministic=False)
        gpu = world.device.type == "cuda"
        _compile_without_limit()
        ceilings, tables = measure_ceilings(config, world, formats)
        compiled, chosen = compiles(config, gpu), stems(config, gpu)
        for stem, num in product(chosen, micro_batches(config, gpu)):
            setting = Setting(stem, num, config.width, compiled)
            tables.append(_table(config, setting, world, formats, ceilings))
        if gpu and not config.micro_batch_size:  # small ones too, which CUDA graphs are for
            small = Setting(chosen[0], _SMALL, config.width, compiled)
            tables.append(_table(config, small, world, formats, ceilings, versions=(V1,)))
        tables.append(_parts(config, setting, world, formats))
        return tables


def _compile_without_limit() -> None:
    """All networks here are compiled from the same code; after the usual eight torch would run the rest uncompiled."""
    import torch._dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 1024)


def _table(
    config: BenchConfig,
    setting: Setting,
    world: World,
    formats: NumberFormat,
    ceilings: Ceilings,
    versions: tuple[str, ...] = (V1, V2),
) -> Table:
    notes, subjects, costs = [], dict[str, Subject](), dict[str, Cost]()
    for name, build in _subjects(setting, formats, versions):
        try:
            subject = build()
            if name == _uncompiled(name):
                costs[name] = cost_of(subject.step)
            for _ in range(2):
                subject.step()
            subjects[name] = subject
        except Exception as error:  # noqa: BLE001 - no memory, no compiler; the others are measured
            notes.append(f"{name}: {failure(error)}")
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    rows = [
        Row(row.name, row.values, row.busy, _columns(row, costs, setting.num_images, ceilings))
        for row in in_turn(
            {name: s.step for name, s in subjects.items()}, config.repeats, config.seconds, wait_for(world.device)
        )
    ]
    if setting.width != 1:
        notes.append(f"width {setting.width:g}; torchvision's googlenet has no width, so it is left out")
    notes.append("% of copy: the bytes that operations read and write, each by itself; what a cache serves counts too")
    notes.append("torchvision's as its users run it: eager, torch's default SGD, dropout, batch-norm statistics kept")
    threads = "" if world.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    title = f"{setting.stem} stem, micro-batch {setting.num_images}, {formats.name}{threads}, SGD"
    reference = THEIRS if THEIRS in subjects else next(iter(subjects), "")
    return Table(title, "images/s", rows, reference, notes=notes)


def _uncompiled(name: str) -> str:
    return name.removesuffix(", compiled").removesuffix(", CUDA graphs")


def _columns(row: Row, costs: Mapping[str, Cost], num_images: int, ceilings: Ceilings) -> dict[str, float]:
    cost = costs.get(_uncompiled(row.name))
    if cost is None:  # there was no memory for the uncompiled one
        return {}
    columns = shares(row, cost, num_images, ceilings, eager=row.name in costs)
    return columns | ({"operations": cost.num_operations} if row.name in costs else {})


def _subjects(
    setting: Setting, formats: NumberFormat, versions: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """What is compared: its name and what builds it.

    Compiled, which takes long, only V1 in both forms and V2; CUDA graphs where small micro-batches leave the GPU idle.
    """
    num = setting.num_images
    for version in versions:
        for merged in ("off", "on"):
            kind = f"{version}, 1x1 merged" if merged == "on" else f"{version}, plain"
            name: Any = _NAMES[version]
            config = ModelConfig(name=name, stem=setting.stem, width=setting.width, merge_1x1=merged)
            yield kind, partial(networks.ours, config, num, formats)
            if setting.compiled and (version == V1 or merged == "off"):
                yield f"{kind}, compiled", partial(networks.ours, config, num, formats, "default")
            if setting.compiled and num <= _SMALL and formats.device_type == "cuda" and merged == "off":
                yield f"{kind}, CUDA graphs", partial(networks.ours, config, num, formats, "reduce-overhead")
    if setting.width == 1 and setting.stem != "whiten":  # which torchvision's cannot have
        for kind, last in ((THEIRS, False), (THEIRS_LAST, True)):
            yield kind, partial(networks.theirs, setting.stem, num, formats, last)


def _parts(config: BenchConfig, setting: Setting, world: World, formats: NumberFormat) -> Table:
    """Where the time of V1's step goes, as training steps it by default."""
    rows = []
    wait = wait_for(world.device)
    for muon in (False, True):
        model = ModelConfig(stem=setting.stem, width=setting.width)
        mode = "default" if setting.compiled else None
        subject = networks.ours(model, setting.num_images, formats, mode, muon)
        for _ in range(3):
            subject.step()
        times = [subject.parts(wait) for _ in range(max(config.repeats, 3))]
        forward, backward, stepped = (list(column) for column in zip(*times, strict=True))
        if not muon:
            rows += [Row("forward", [1e3 * t for t in forward]), Row("backward", [1e3 * t for t in backward])]
        rows.append(Row("Muon and SGD" if muon else "SGD", [1e3 * t for t in stepped]))
    total = sum(statistics.median(row.values) for row in rows[:3])
    rows = [Row(r.name, r.values, more={"% of step": 100 * r.median / total}) for r in rows[:3]] + rows[3:]
    title = f"a step of V1 in parts, {setting.stem} stem, micro-batch {setting.num_images}"
    return Table(title, "ms", rows, lower_is_better=True)
