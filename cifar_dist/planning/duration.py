"""How long a run takes, from a measured training speed, and whether it fits into a time limit."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from cifar_dist.distributed import init_distributed
from cifar_dist.errors import UserError
from cifar_dist.fault_tolerance.out_of_memory import explain_out_of_memory
from cifar_dist.planning.plan import Findings, Plan
from cifar_dist.reports.finished_runs import changed_settings, read_runs
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import choose_precision, set_backends
from cifar_dist.training.schedule import LOW_RESOLUTION, Step
from cifar_dist.training.summary import device_name
from cifar_dist.training.train_step import TrainStep

NOTICE_S = 120
"""slurm/train.sh asks for a signal this long before the time limit; the run then saves and ends."""
_MEASURE_S, _MAX_STEPS = 5.0, 50
# Settings beside `model` that decide how much there is to compute per image.
_COST = ("augment.low_resolution_share", "optim.name", "debug.anomaly", "run.deterministic")


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, at full and at low resolution.

    startup_seconds: from the start of the process to its first step; None: not known.
    source: where the numbers come from, for people.
    num_devices: on how many devices they were measured; None: not known.
    memory_bytes: peak of torch's allocations in a step on a GPU; None: not measured.
    """

    seconds: float
    low_resolution_seconds: float
    startup_seconds: float | None
    source: str
    num_devices: int | None = None
    memory_bytes: int | None = None

    def training_seconds(self, plan: Plan) -> float:
        low = plan.schedule.low_resolution_steps
        return low * self.low_resolution_seconds + (plan.schedule.total_steps - low) * self.seconds


def step_time(plan: Plan, images_per_second: float | None, like: Path | None, measured: bool) -> StepTime | None:
    """The step time from the source that is given; None if none is.

    Raises:
        UserError: the run `like` does not fit, or this machine cannot do a step.
    """
    if images_per_second is not None:
        return from_speed(images_per_second, plan)
    if like is not None:
        return from_run(like, plan)
    return measure(plan) if measured else None


def from_speed(images_per_second: float, plan: Plan) -> StepTime:
    """From images per second and device; several devices are assumed to scale perfectly."""
    seconds = plan.config.train.batch_size / (images_per_second * plan.world_size)
    return StepTime(seconds, seconds, None, f"given: {images_per_second:,.0f} images/s per device")


def from_run(directory: Path, plan: Plan) -> StepTime:
    """From a finished run of the same network.

    Raises:
        UserError: it is not finished, or its settings make a step cost more or less.
    """
    (run,) = read_runs([directory])
    figures = run.figures
    changed = changed_settings(run.config, plan.config)
    lines = [f"{k} was {a}, is {b}" for k, (a, b) in changed.items() if k.startswith("model.") or k in _COST]
    if lines:
        raise UserError("\n  ".join([f"{directory} has other settings, so its training speed does not apply:", *lines]))
    devices = figures["device_names"]
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    speed = figures["images_per_second"] / figures["world_size"]
    source = f"{directory}: {speed:,.0f} images/s per device on {kinds}"
    for name, then, now in (
        ("micro-batch", figures["micro_batch_size"], plan.config.train.micro_batch_size),
        ("precision", figures["precision"], plan.precision),
    ):
        if then != now:
            source += f"; {name} {then}, here {now}"
    first_step = json.loads((directory / "summary.json").read_text(encoding="utf-8")).get("first_step_seconds")
    return replace(
        from_speed(speed, plan), source=source, startup_seconds=first_step, num_devices=figures["world_size"]
    )


def measure(plan: Plan) -> StepTime:
    """Time the optimizer steps of one device of the run on a device of this machine, with black images.

    Raises:
        UserError: there is no such device, or its memory is too small.
    """
    from cifar_dist.benchmarks.baselines import blank_batches  # imports torchvision

    config, low_share = plan.config, plan.config.augment.low_resolution_share
    train = replace(config.train, batch_size=config.train.micro_batch_size * plan.accumulation)
    with init_distributed(config.train.device) as world, explain_out_of_memory(config, 0, plan.world_size):
        precision = choose_precision(config.train.precision, world.device)
        set_backends(config.train, config.run.deterministic, world.device)
        started = time.perf_counter()
        train_step = TrainStep(replace(config, train=train), world, precision)
        metrics, batches = Metrics(world), blank_batches(config.train.micro_batch_size, world.device)

        def timed_step(image_size: int | None) -> float:
            before = time.perf_counter()
            train_step.run(Step(0, 0.0, image_size), batches, metrics)
            metrics.window()  # waits for the device
            return time.perf_counter() - before

        timed_step(None if low_share < 1 else LOW_RESOLUTION)
        startup = time.perf_counter() - started
        full = _median(lambda: timed_step(None)) if low_share < 1 else None
        low = _median(lambda: timed_step(LOW_RESOLUTION)) if low_share > 0 else full
        on_gpu = world.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(world.device) if on_gpu else None
        threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    source = f"measured here, {device_name(world.device)}{threads}, without reading data and without other devices"
    seconds = [value for value in (full, low) if value is not None]
    return StepTime(seconds[0], seconds[-1], startup, source, num_devices=1, memory_bytes=memory)


def _median(timed: Callable[[], float]) -> float:
    """Median over some seconds of calls, at least two, after one that does not count."""
    timed()
    seconds = [timed(), timed()]
    while sum(seconds) < _MEASURE_S and len(seconds) < _MAX_STEPS:
        seconds.append(timed())
    return statistics.median(seconds)


def check_time_limit(plan: Plan, step_time: StepTime | None, limit_seconds: int, findings: Findings) -> None:
    """Add to `findings` whether the run fits into an allocation of `limit_seconds`, or goes over how many."""
    if step_time is None:
        findings.warnings.append("the time limit is not checked, because the training speed is not known.")
        return
    startup, training = step_time.startup_seconds or 0.0, step_time.training_seconds(plan)
    # Each allocation has a start-up, and its run ends NOTICE_S early.
    usable = limit_seconds - NOTICE_S - startup
    step = max(step_time.seconds, step_time.low_resolution_seconds)
    limit = (
        f"the time limit {clock(limit_seconds)}, less the {NOTICE_S} s at its end in which slurm/train.sh stops a run,"
    )
    needs = f"{'training' if step_time.startup_seconds is None else 'start-up and training'} need"
    needs += f"{'s' * (step_time.startup_seconds is None)} {clock(startup + training)}"
    if training <= usable:
        findings.time_limit = (
            f"{clock(limit_seconds)}; {clock(usable - training)} are left of it before the last {NOTICE_S} s"
        )
    elif usable < step:
        findings.refusals.append(
            f"{limit} is too short for start-up and one step ({clock(startup + step)}); {needs}. Raise the limit."
        )
    else:
        num = math.ceil(training / usable)
        epochs = f"One allocation has room for {int(usable / training * plan.epochs)} of {plan.epochs:g} epochs."
        several = f"{num} allocations ({num - 1} requeues)"
        if plan.config.run.resume == "auto":
            findings.warnings.append(f"{limit} is too short: {needs}. The run takes {several}. {epochs}")
        else:
            findings.refusals.append(
                f"{limit} is too short: {needs}. {epochs} With --run.name NAME --run.resume auto the run takes "
                f"{several}; or raise the limit, or lower train.epochs."
            )


def clock(seconds: float) -> str:
    """Seconds as [hours:]minutes:seconds, rounded up; below ten as seconds with decimals."""
    return f"{seconds:.2g} s" if seconds < 10 else tqdm.format_interval(math.ceil(seconds))
