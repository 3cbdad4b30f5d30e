"""What a run is going to be, worked out by the code that trains: order, schedule, network, optimizer, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from cifar_dist.config import NUM_CLASSES, NUM_TRAIN, Config
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import split
from cifar_dist.distributed import World
from cifar_dist.limits import accumulation_steps
from cifar_dist.models.layers import num_parameters
from cifar_dist.models.registry import MERGES
from cifar_dist.training import checkpoint, memory, optim
from cifar_dist.training.precision import NumberFormat, number_format
from cifar_dist.training.schedule import Schedule
from cifar_dist.training.stepper import Stepper
from cifar_dist.training.trainer import Trainer


@dataclass(frozen=True)
class Checkpoints:
    """How many are written, how many stay at the end, at least and at most: a best one is unknown beforehand. Bytes:
    of one file; and on disk at the most, while one is written and before an old one goes."""

    written: tuple[int, int]
    kept: tuple[int, int]
    size_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Forecast:
    """A run of `config` on `world_size` devices. Steps count from 1, as the first step done; `lr_shares[k]` is the
    learning rate in step k + 1 as a share of its peak, `lr_peaks` are those of the optimizer's groups; `saves` are the
    steps after which a checkpoint is written in any case."""

    config: Config
    world_size: int
    device_type: str
    precision: str
    accumulation: int
    params: int
    train_n: int
    dropped_per_epoch: int
    schedule: Schedule
    lr_shares: list[float]
    lr_peaks: dict[str, float]
    saves: list[int]
    validations: list[int]
    validation_n: int
    checkpoints: Checkpoints
    memory: memory.Memory

    @property
    def epochs(self) -> float:
        return self.schedule.total_steps / self.schedule.steps_per_epoch


def forecast(config: Config, world_size: int) -> Forecast:
    """Work out a run; everything happens on the CPU, with the real network and without the dataset.

    Raises:
        UserError: the batch sizes do not divide, or not one step fits into an epoch.
    """
    accumulation = accumulation_steps(config.train.batch_size, config.train.micro_batch_size, world_size)
    trainer = _trainer(config)
    stepper, schedule, order = trainer.stepper, trainer.schedule, trainer.order
    steps = range(1, schedule.total_steps + 1)
    validation_n = len(trainer.split.validation)
    validations = [step for step in steps if validation_n and schedule.should_validate(step)]
    saves = [step for step in steps if schedule.should_save(step)]
    return Forecast(
        config=config,
        world_size=world_size,
        device_type=device_type(config),
        precision=stepper.number_format.name,
        accumulation=accumulation,
        params=num_parameters(stepper.scored_model),
        train_n=len(order.samples),
        dropped_per_epoch=order.dropped_per_epoch,
        schedule=schedule,
        lr_shares=[optim.schedule(step - 1, schedule.total_steps, config.optim) for step in steps],
        lr_peaks=_peaks(stepper.optimizer),
        saves=saves,
        validations=validations,
        validation_n=validation_n,
        checkpoints=_checkpoints(config, trainer, saves, validations),
        memory=memory.estimate(stepper, config.train.micro_batch_size, config.eval.batch_size),  # wears it out
    )


def device_type(config: Config) -> str:
    """What the run is planned for: a login node has no GPU, so only `train.device` cpu means none."""
    return "cpu" if config.train.device == "cpu" else "cuda"


def _trainer(config: Config) -> Trainer:
    """The trainer of the run, in a world of one CPU, which stands in for all devices by accumulation."""
    merge = config.model.merge_1x1
    if merge == "auto":
        merge = "on" if MERGES[device_type(config)] else "off"
    plain = replace(
        config, train=replace(config.train, compile="off"), model=replace(config.model, merge_1x1=merge)
    )  # fmt: skip
    stepper = Stepper(plain, World(0, 1, 0, 1, torch.device("cpu")), _number_format(config))
    # A device's gradients exist all the time when it accumulates, and with DDP, whose buckets they lie in: two
    # micro-batches in a step are enough to see what any number takes.
    stepper.accumulation = min(2, stepper.accumulation)
    # CIFAR-10 has equally many training samples of each class, and here nothing else about them matters.
    labels = np.arange(NUM_TRAIN, dtype=np.int64) % NUM_CLASSES
    parts = split(labels, config.data.train_on, config.data.subset)
    unread = cast(BetonLoader, None)
    return Trainer(config, stepper, parts, unread, lambda _step, _metrics: None, lambda _step: None, Path())


def _number_format(config: Config) -> NumberFormat:
    """As the run would choose it; a GPU that is not here is taken for one with bf16."""
    on_gpu = device_type(config) == "cuda"
    if not on_gpu or torch.cuda.is_available():
        found = number_format(config.train.precision, torch.device("cuda" if on_gpu else "cpu"))
        return NumberFormat(found.name, "cpu")
    return NumberFormat("bf16" if config.train.precision == "auto" else config.train.precision, "cpu")


def _peaks(optimizer: torch.optim.SGD) -> dict[str, float]:
    """The peak rate of each group that has parameters, by what is in it; one name where several share a rate."""
    names = ("SGD", "SGD (norm scales)", "SGD (biases)", "Muon")[: len(optimizer.param_groups)]
    peaks: dict[str, float] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        if group["params"] and (name == "Muon" or group["peak_lr"] not in peaks.values()):
            peaks[name] = group["peak_lr"]
    return peaks


def _checkpoints(config: Config, trainer: Trainer, saves: list[int], validations: list[int]) -> Checkpoints:
    # The first validation is always the best so far, and so saved; of the others each may be.
    written = len({*saves, *validations[:1]}), len({*saves, *validations})
    keep = config.train.keep_checkpoints
    kept = min(keep, written[0]), min(keep + bool(validations), written[1])
    size = len(checkpoint.encode(trainer.schedule.total_steps, trainer.state()))
    return Checkpoints(written, kept, size, min(kept[1] + 1, written[1]) * size)
