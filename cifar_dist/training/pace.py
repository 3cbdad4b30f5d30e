"""How long a run takes, from something that was measured and from nothing else."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cifar_dist.config import Config
from cifar_dist.distributed import joined
from cifar_dist.errors import UserError
from cifar_dist.training.finished import read_runs
from cifar_dist.training.forecast import Forecast
from cifar_dist.training.memory import blank_batches
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import number_format, set_backends
from cifar_dist.training.schedule import LOW_RESOLUTION, Step
from cifar_dist.training.stepper import Stepper
from cifar_dist.training.summary import device_names

NOTICE_S = 120
"""Before the time limit, the signal of slurm/train.sh, on which a run saves and ends."""
_MEASURE_S, _MAX_STEPS = 5.0, 50


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step at full and at low resolution, and from the start of a process to its first step
    (None: not known); `source` says where from, `num_devices` on how many together it was measured, if known."""

    step_seconds: float
    small_step_seconds: float
    startup_seconds: float | None
    source: str
    num_devices: int | None = None


@dataclass(frozen=True)
class Allocations:
    """A run within a time limit. `needed_seconds`: start-up and training; `num`: allocations that it takes, None when
    one has no time for a single step; `epochs`: whole ones that fit into one allocation."""

    needed_seconds: float
    num: int | None
    epochs: int


def training_seconds(pace: Pace, plan: Forecast) -> float:
    small = plan.schedule.low_resolution_steps
    return small * pace.small_step_seconds + (plan.schedule.total_steps - small) * pace.step_seconds


def allocations(pace: Pace, plan: Forecast, limit_seconds: float) -> Allocations:
    """A run in allocations of `limit_seconds`, each with a start-up and stopped NOTICE_S before its end."""
    startup, training = pace.startup_seconds or 0.0, training_seconds(pace, plan)
    usable = limit_seconds - NOTICE_S - startup
    num = math.ceil(training / usable) if usable >= max(pace.step_seconds, pace.small_step_seconds) else None
    return Allocations(startup + training, num, max(0, int(usable / training * plan.epochs)))


def clock(seconds: float) -> str:
    """Seconds as [days-]hours:minutes:seconds, rounded up; below ten with decimals."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = int(-(-seconds // 1))
    days, rest = divmod(whole, 86_400)
    return f"{f'{days}-' if days else ''}{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"


def given(images_per_second: float, plan: Forecast) -> Pace:
    """From a rate per device."""
    seconds = plan.config.train.batch_size / (images_per_second * plan.world_size)
    return Pace(seconds, seconds, None, f"given: {images_per_second:,.0f} images/s per device")


def like(directory: Path, plan: Forecast) -> Pace:
    """From a finished run of the same network.

    Raises:
        UserError: it is not finished, or so different that its rate says nothing.
    """
    (run,) = read_runs([directory])
    changed = _differences(run.config, plan.config)
    if changed:
        raise UserError(f"{directory} did other work per image, so its rate says nothing here:\n  {changed}")
    devices = run.figures["device_names"]
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    rate = run.figures["images_per_second"] / run.figures["world_size"]
    others = [
        f"{name} {then}, here {now}"
        for name, then, now in (
            ("micro-batch", run.figures["micro_batch_size"], plan.config.train.micro_batch_size),
            ("precision", run.figures["precision"], plan.precision),
        )
        if then != now
    ]
    source = "; ".join([f"{directory}: {rate:,.0f} images/s per device on {kinds}", *others])
    first_step = json.loads((directory / "summary.json").read_text(encoding="utf-8")).get("first_step_seconds")
    num = run.figures["world_size"]
    return replace(given(rate, plan), source=source, startup_seconds=first_step, num_devices=num)


def _differences(then: Config, now: Config) -> str:
    """The settings that decide how much there is to compute for an image, where they differ."""
    keys = [("model", key) for key in asdict(now.model)]
    keys += [("augment", "low_resolution_share"), ("optim", "name"), ("debug", "anomaly"), ("run", "deterministic")]
    values = [(f"{s}.{k}", getattr(getattr(then, s), k), getattr(getattr(now, s), k)) for s, k in keys]
    return "\n  ".join(f"{name} was {a}, is {b}" for name, a, b in values if a != b)


def measure(plan: Forecast) -> Pace:
    """By doing what one device of the run does in a step, here, a few times, with black images from memory.

    Raises:
        UserError: the device is not there, or cannot do it.
    """
    config, share = plan.config, plan.config.augment.low_resolution_share
    train = replace(config.train, batch_size=config.train.micro_batch_size * plan.accumulation)
    with joined(config.train.device) as world:
        formats = number_format(config.train.precision, world.device)
        set_backends(config.train, config.run.deterministic)
        started = time.perf_counter()
        stepper = Stepper(replace(config, train=train), world, formats)
        metrics, batches = Metrics(world), blank_batches(config.train.micro_batch_size, world.device)

        def step(side: int | None) -> float:
            before = time.perf_counter()
            stepper.step(Step(0, 0.0, side), batches, metrics)
            metrics.window()  # waits for the device
            return time.perf_counter() - before

        step(None if share < 1 else LOW_RESOLUTION)
        startup = time.perf_counter() - started
        full = _median(lambda: step(None)) if share < 1 else 0.0
        small = _median(lambda: step(LOW_RESOLUTION)) if share > 0 else full
        threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
        source = f"measured here, {device_names(world)[0]}{threads}, without reading data and without other devices"
    return Pace(full or small, small, startup, source, num_devices=1)


def _median(timed: Callable[[], float]) -> float:
    """Of calls over some seconds, two at least, after one that does not count."""
    timed()
    seconds = [timed(), timed()]
    while sum(seconds) < _MEASURE_S and len(seconds) < _MAX_STEPS:
        seconds.append(timed())
    return statistics.median(seconds)
