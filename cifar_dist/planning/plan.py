"""What a run will do, computed by the code that trains: steps, learning rates, checkpoints; and why it cannot work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from cifar_dist.config import NUM_CLASSES, NUM_TRAIN, Config, accumulation_steps, to_yaml
from cifar_dist.data.order import Order, split
from cifar_dist.distributed import World
from cifar_dist.models.layers import num_parameters
from cifar_dist.training import checkpoint, run_directory
from cifar_dist.training.precision import Precision, choose_precision
from cifar_dist.training.schedule import Schedule
from cifar_dist.training.train_step import TrainStep


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run. `written` and `kept`: least and most, since the steps of the best scores are not known.

    disk_bytes: largest size on disk, when a checkpoint is written and no old one removed yet.
    """

    written: tuple[int, int]
    kept: tuple[int, int]
    size_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """A run of `config` on `world_size` devices of `nodes` nodes. Steps count from 1.

    lr_peaks: peak learning rate by parameter group. saves: steps after which a checkpoint is always written.
    """

    config: Config
    nodes: int
    world_size: int
    precision: str
    accumulation: int
    params: int
    train_n: int
    dropped_per_epoch: int
    schedule: Schedule
    lr_peaks: dict[str, float]
    saves: list[int]
    validations: list[int]
    validation_n: int
    checkpoints: Checkpoints

    @property
    def epochs(self) -> float:
        return self.schedule.total_steps / self.schedule.steps_per_epoch

    def lr_fraction(self, step: int) -> float:
        """Learning rate of `step` divided by its peak."""
        return self.schedule.step(step - 1).lr_fraction

    def lr_points(self) -> dict[str, int]:
        """The steps that show the schedule: start, half of the peak, peak, half again (if reached), end."""
        steps = range(1, self.schedule.total_steps + 1)
        fractions = {step: self.lr_fraction(step) for step in steps}
        peak = max(steps, key=fractions.__getitem__)
        half = next(step for step in steps if fractions[step] >= fractions[peak] / 2)
        points = {"start": 1, "half": half, "peak": peak}
        half_again = next((step for step in steps[peak:] if fractions[step] <= fractions[peak] / 2), None)
        if half_again is not None:
            points["half again"] = half_again
        return points | {"end": len(steps)}


def make_plan(config: Config, nodes: int, gpus: int) -> Plan:
    """Plan a run on `nodes` x `gpus` devices. Builds the network on the CPU; needs neither GPU nor dataset.

    Raises:
        UserError: the batch sizes do not divide, or an epoch has no whole step.
    """
    # All else about the samples does not matter here: CIFAR-10 has equally many of each class.
    labels = np.arange(NUM_TRAIN, dtype=np.int64) % NUM_CLASSES
    samples = split(labels, config.data.train_on, config.data.subset)
    order = Order(samples.train, config.train.batch_size, config.run.seed)
    schedule = Schedule(config, order.steps_per_epoch)
    steps = range(1, schedule.total_steps + 1)
    saves = [step for step in steps if schedule.should_save(step)]
    validations = [step for step in steps if len(samples.validation) and schedule.should_validate(step)]
    # One CPU stands for all devices: the network, its optimizer and their sizes are the same.
    uncompiled = replace(config, train=replace(config.train, compile="off"))
    train_step = TrainStep(uncompiled, World(0, 1, 0, 1, torch.device("cpu")), _precision(config))
    size = len(checkpoint.encode(schedule.total_steps, train_step.state() | {"config": to_yaml(config)}))
    return Plan(
        config=config,
        nodes=nodes,
        world_size=nodes * gpus,
        precision=train_step.precision.name,
        accumulation=accumulation_steps(config.train.batch_size, config.train.micro_batch_size, nodes * gpus),
        params=num_parameters(train_step.scored_model),
        train_n=len(order.samples),
        dropped_per_epoch=order.dropped_per_epoch,
        schedule=schedule,
        lr_peaks=_lr_peaks(train_step.optimizer),
        saves=saves,
        validations=validations,
        validation_n=len(samples.validation),
        checkpoints=_checkpoints(config.train.keep_checkpoints, saves, validations, size),
    )


def _precision(config: Config) -> Precision:
    """The precision of the run. A GPU that this machine does not have is assumed to support bf16."""
    on_gpu, wanted = config.train.device != "cpu", config.train.precision
    if on_gpu and not torch.cuda.is_available():
        return Precision("bf16" if wanted == "auto" else wanted, "cpu")
    return Precision(choose_precision(wanted, torch.device("cuda" if on_gpu else "cpu")).name, "cpu")


def _lr_peaks(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Peak learning rate of each parameter group; of SGD's groups with equal rates only the first."""
    peaks: dict[str, float] = {}
    # Muon adds the fourth group.
    for name, group in zip(("SGD", "SGD (norm scales)", "SGD (biases)", "Muon"), optimizer.param_groups, strict=False):
        if group["params"] and (name == "Muon" or group["peak_lr"] not in peaks.values()):
            peaks[name] = group["peak_lr"]
    return peaks


def _checkpoints(keep: int, saves: list[int], validations: list[int], size: int) -> Checkpoints:
    # The first validation is always the best so far, so it is saved. Each later one may be.
    written = len({*saves, *validations[:1]}), len({*saves, *validations})
    kept = min(keep, written[0]), min(keep + bool(validations), written[1])
    return Checkpoints(written, kept, size, min(kept[1] + 1, written[1]) * size)


@dataclass
class Findings:
    """Messages for the user. refusals: why the run cannot work. time_limit: how the run fits into its time limit."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    time_limit: str | None = None


def check(plan: Plan) -> Findings:
    """Check the warm-up, and on this machine the dataset and the run directory."""
    optim, total, folder = plan.config.optim, plan.schedule.total_steps, plan.config.data.dir
    findings = Findings()
    highest = plan.lr_fraction(plan.lr_points()["peak"])
    if highest < 1:
        findings.warnings.append(
            f"the learning rate reaches only {highest:.0%} of its peak: the warm-up takes at least "
            f"{optim.warmup_min_steps} steps (optim.warmup_min_steps), but the decay starts after "
            f"{round(optim.warmup_share * total)} of {total} steps (optim.warmup_share)."
        )
    missing = [name for name in ("train.beton", "test.beton") if not (folder / name).exists()]
    if missing:
        findings.warnings.append(
            f"no dataset in {folder} on this machine ({', '.join(missing)} missing). Training prepares it when it "
            f"starts, which needs the internet. To prepare it now: python -m cifar_dist.prepare --data.dir {folder}"
        )
    findings.refusals += _check_run_directory(plan)
    return findings


def _check_run_directory(plan: Plan) -> Iterator[str]:
    directory, needed = run_directory.path_of(plan.config), plan.checkpoints.disk_bytes
    try:
        if plan.config.run.resume != "auto" and run_directory.holds_run(directory):
            yield (
                f"the run directory {directory} already holds a run. Resume it with --run.resume auto, or choose "
                f"another --run.name."
            )
        parent = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise NotADirectoryError(errno.EACCES, f"{parent} is not a writable folder")
        folder = directory / "checkpoints"
        existing = sum(checkpoint.path_of(folder, step).stat().st_size for step in checkpoint.all_steps(folder))
        free = shutil.disk_usage(parent).free + existing
    except OSError as error:
        yield f"the run directory {directory} cannot be used: {error.strerror}. Choose another --run.dir."
        return
    if free < needed:
        yield (
            f"{parent} has {free / 1e6:,.0f} MB free, but the checkpoints need {needed / 1e6:,.0f} MB. Make room, "
            f"lower train.keep_checkpoints, or choose another --run.dir."
        )
