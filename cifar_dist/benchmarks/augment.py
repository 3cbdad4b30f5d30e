"""This project's augmentation on its device, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cifar_dist.benchmarks.device import failure, wait_for
from cifar_dist.benchmarks.measure import Table, Work, in_turn
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment
from cifar_dist.distributed import joined
from cifar_dist.training.precision import NumberFormat, number_format

EAGER, COMPILED, NORMALIZE = "eager", "compiled", "normalised only"


def measure(config: BenchConfig) -> list[Table]:
    """Flip, translation, cutout and normalisation of a batch in memory, its random draws included."""
    with joined(config.device) as world:
        formats = number_format(config.precision, world.device)
        on_gpu = world.device.type == "cuda"
        tables = []
        for num in config.micro_batch_size or ((128, 512, 1024) if on_gpu else (128, 512)):
            images = torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8, device=world.device).permute(0, 3, 1, 2)
            cases = {EAGER: _case(augment.apply, images, formats), NORMALIZE: _normalized(images, formats)}
            notes = []
            if config.compile != "off":  # a single kernel, which a CPU compiles in seconds
                compiled = _case(torch.compile(augment.apply, dynamic=False), images, formats)
                try:
                    compiled()
                    cases[COMPILED] = compiled
                except Exception as error:  # noqa: BLE001 - such as no compiler; the others are measured
                    notes.append(f"{COMPILED}: {failure(error)}")
            rows = in_turn(cases, config.repeats, config.seconds / 2, wait_for(world.device), warm_up=3)
            threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
            tables.append(Table(f"{formats.name}, batches of {num}{threads}", "images/s", rows, EAGER, notes=notes))
        return tables


def _case(apply: Callable[..., Tensor], images: Tensor, formats: NumberFormat) -> Work:
    indices, settings = torch.arange(len(images), device=images.device), AugmentConfig()

    def work() -> float:
        draws = augment.draw(indices, 0, 0, settings)
        apply(images, draws, settings.cutout, formats.inputs)
        return float(len(images))

    return work


def _normalized(images: Tensor, formats: NumberFormat) -> Work:
    def work() -> float:
        return float(len(augment.normalize(images, formats.inputs)))

    return work
