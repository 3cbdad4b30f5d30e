"""What a run will do, computed by the code that trains, and why it cannot work."""

import math
import os
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from cifar_dist.cli import accumulation_steps
from cifar_dist.config import NUM_CLASSES, NUM_TRAIN, OPTIMIZERS, Config, to_yaml
from cifar_dist.data.cifar10 import BETON_FILES
from cifar_dist.data.loader import Batch
from cifar_dist.data.order import Order, split
from cifar_dist.distributed import World, init_distributed
from cifar_dist.errors import UserError, explain_os_error
from cifar_dist.fault_tolerance.health import explain_out_of_memory
from cifar_dist.files import escape_path
from cifar_dist.models.layers import num_parameters
from cifar_dist.training import checkpoint, run_directory
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import Precision, choose_precision, set_backends
from cifar_dist.training.schedule import Schedule, Step
from cifar_dist.training.summary import device_name
from cifar_dist.training.train_step import TrainStep

NOTICE_S = 120  # slurm/train.sh asks for a signal this long before the time limit; the run then saves and ends
_MEASURE_S = 5.0
Figures: TypeAlias = dict[str, Any]  # of a plan, named as in summary.json where it has them; steps count from 1


@dataclass(frozen=True)
class TrainingTime:
    """How long training takes, and where the number comes from."""

    train_seconds: float
    step_seconds: float  # mean over all steps
    source: str
    peak_memory_bytes: int | None = None  # of torch's allocations in a step on a GPU; None: not measured


@dataclass
class Findings:
    refusals: list[str] = field(default_factory=list)  # why the run cannot work
    warnings: list[str] = field(default_factory=list)
    time_limit: str | None = None  # how the run fits into its time limit


def make_plan(config: Config, nodes: int, gpus: int) -> Figures:
    """Plan a run on `nodes` x `gpus` devices. Builds the network on the CPU; needs neither GPU nor dataset."""
    # Made-up labels: only the size of each class matters here, and in CIFAR-10 all are equal.
    labels = np.arange(NUM_TRAIN, dtype=np.int64) % NUM_CLASSES
    samples = split(labels, config.data.train_on, config.data.subset)
    train, order = config.train, Order(samples.train, config.train.batch_size, config.run.seed)
    schedule = Schedule(config, order.steps_per_epoch)
    steps = range(1, schedule.total_steps + 1)
    validations = [step for step in steps if len(samples.validation) and schedule.should_validate(step)]
    # One CPU stands for all devices: the network, its optimizer and their sizes are the same.
    uncompiled = replace(config, train=replace(train, compile="off"))
    train_step = TrainStep(uncompiled, World(0, 1, 0, 1, torch.device("cpu")), _precision(config))
    size = len(checkpoint.encode(len(steps), train_step.state() | {"config": to_yaml(config)}))
    # At most: each validation may give the best score so far, and is then saved.
    written = len({*filter(schedule.should_save, steps), *validations})
    kept = min(train.keep_checkpoints + bool(validations), written)
    return {
        "model": config.model.name,
        "params": num_parameters(train_step.scored_model),
        "precision": train_step.precision.name,
        "nodes": nodes,
        "world_size": nodes * gpus,
        "batch_size": train.batch_size,
        "micro_batch_size": train.micro_batch_size,
        "accumulation": accumulation_steps(train.batch_size, train.micro_batch_size, nodes * gpus),
        "train_n": len(order.samples),
        "steps": len(steps),
        "steps_per_epoch": order.steps_per_epoch,
        "epochs": len(steps) / order.steps_per_epoch,
        "samples_dropped_per_epoch": order.dropped_per_epoch,
        "low_resolution_steps": schedule.low_resolution_steps,
        "learning_rate": _learning_rates(schedule, train_step.optimizer, config.optim.name not in OPTIMIZERS),
        "checkpoints_written": written,
        "checkpoints_kept": kept,
        "checkpoint_bytes": size,
        "checkpoints_bytes": min(kept + 1, written) * size,  # before an old one is removed
        "validations": validations,
        "val_n": len(samples.validation) or None,
    }


def _precision(config: Config) -> Precision:
    """The precision of the run. A GPU that this machine does not have is assumed to support bf16."""
    on_gpu, wanted = config.train.device != "cpu", config.train.precision
    if on_gpu and not torch.cuda.is_available():
        return Precision("bf16" if wanted == "auto" else wanted, "cpu")
    return Precision(choose_precision(wanted, torch.device("cuda" if on_gpu else "cpu")).name, "cpu")


def _learning_rates(schedule: Schedule, optimizer: torch.optim.Optimizer, own: bool) -> dict[str, Figures]:
    """Rates of the parameter groups at the first step, at the peak, halfway from there to the end, and at the end.

    Of an `own` optimizer: each rate once.
    """
    fractions = [schedule.step(number).lr_fraction for number in range(schedule.total_steps)]
    last, peak = len(fractions) - 1, fractions.index(max(fractions))
    groups = optimizer.param_groups
    if own:
        kind = type(optimizer).__name__
        rates = dict.fromkeys(group["peak_lr"] for group in groups)  # there may be a group for each parameter
        peaks = {f"{kind} {k}" if len(rates) > 1 else kind: rate for k, rate in enumerate(rates, 1)}
    else:
        names = ("SGD", "SGD (norm scales)", "SGD (biases)", "Muon")
        peaks = {name: group["peak_lr"] for name, group in zip(names, groups, strict=False) if group["params"]}
    points = {"start": 0, "peak": peak, "halfway": (peak + last) // 2, "end": last}
    return {
        point: {"step": k + 1, **{name: peak_lr * fractions[k] for name, peak_lr in peaks.items()}}
        for point, k in points.items()
    }


def from_speed(images_per_second: float, plan: Figures) -> TrainingTime:
    """From images per second and device; several devices are assumed to scale perfectly."""
    seconds = plan["batch_size"] / (images_per_second * plan["world_size"])
    return TrainingTime(seconds * plan["steps"], seconds, f"given: {images_per_second:,.0f} images/s per device")


def measure(config: Config, plan: Figures) -> TrainingTime:
    """Time the optimizer steps of one device of the run on a device of this machine, with black images."""
    train = replace(config.train, batch_size=plan["micro_batch_size"] * plan["accumulation"])
    with init_distributed(train.device, train.threads) as world, explain_out_of_memory(config, 0, plan["world_size"]):
        num, device, threads = train.micro_batch_size, world.device, torch.get_num_threads()
        set_backends(train, config.run.deterministic, device)
        train_step = TrainStep(replace(config, train=train), world, choose_precision(train.precision, device))
        train_step.prepare()
        indices = torch.arange(num, device=device)
        images = torch.zeros(num, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)  # as the loader's
        batches = repeat((0, Batch(images, torch.zeros_like(indices), indices)))
        schedule, seconds = Schedule(config, plan["steps_per_epoch"]), 0.0
        sizes = Counter(schedule.step(number).image_size for number in range(plan["steps"]))
        for image_size, count in sizes.items():
            step = partial(train_step.run, Step(0, 0.0, image_size), batches, Metrics(world))
            timer = Timer("step()", globals={"step": step}, num_threads=threads)  # waits for the GPU, warms up
            seconds += count * timer.blocked_autorange(min_run_time=_MEASURE_S).median
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    name = device_name(device) + f", {threads} threads" * (device.type == "cpu")
    source = f"measured here, {name}, without reading data and without other devices"
    return TrainingTime(seconds, seconds / plan["steps"], source, memory)


def check(config: Config, plan: Figures) -> Findings:
    """Check the dataset, the run directory, and what the run reads, on this machine."""
    folder, source, findings = config.data.dir, config.data.source, Findings()
    read: dict[str, object] = {"model.weights": config.model.weights, "run.resume": config.run.resume}
    missing = [name for name in BETON_FILES if not (folder / name).exists()]
    if missing:
        read["data.source"] = source
        options = ["--data.dir", escape_path(str(folder))]
        if isinstance(source, Path):
            options += ["--data.source", escape_path(str(source))]
        findings.warnings.append(
            f"no dataset in {folder} on this machine ({', '.join(missing)} missing). Training prepares it when it "
            f"starts{'' if isinstance(source, Path) else ', which needs the internet'}. To prepare it now: "
            f"python -m cifar_dist.prepare {shlex.join(options)}"
        )
    for name, path in read.items():
        if isinstance(path, Path) and not os.access(path, os.R_OK):
            findings.refusals.append(f"{name} is {path}, which does not exist here or cannot be read.")
    directory, needed = run_directory.path_of(config), plan["checkpoints_bytes"]
    try:
        with explain_os_error(f"the run directory {directory} cannot be written", "Choose another --run.dir."):
            if refusal := run_directory.refusal(config, directory):
                findings.refusals.append(refusal)
            parent = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
            tempfile.TemporaryFile(dir=parent).close()
            free = shutil.disk_usage(parent).free
            free += sum(path.stat().st_size for path in directory.glob("checkpoints/step-*.pt"))  # will be removed
            if free < needed:
                findings.refusals.append(
                    f"{parent} has {free / 1e6:,.0f} MB free, but the checkpoints need {needed / 1e6:,.0f} MB. Make "
                    f"room, lower train.keep_checkpoints, or choose another --run.dir."
                )
    except UserError as error:
        findings.refusals.append(str(error))
    return findings


def check_time_limit(time: TrainingTime | None, limit_s: int, resumes: bool, findings: Findings) -> None:
    """Add to `findings` whether training fits into an allocation of `limit_s` seconds, or how many it takes."""
    if time is None:
        findings.warnings.append("the time limit is not checked, because the training speed is not known.")
        return
    usable = limit_s - NOTICE_S
    if time.train_seconds <= usable:
        left = f"{clock(usable - time.train_seconds)} are left for start-up, validations and saving"
        findings.time_limit = f"{clock(limit_s)}; {left}, before the last {NOTICE_S} s"
        return
    text = (
        f"the time limit {clock(limit_s)}, less the {NOTICE_S} s before its end at which slurm/train.sh stops a run, "
        f"is too short: training takes {clock(time.train_seconds)}"
    )
    if usable < time.step_seconds:
        findings.refusals.append(f"{text}, one step alone {clock(time.step_seconds)}. Raise the limit.")
        return
    num = math.ceil(time.train_seconds / usable)
    text += f", so the run takes {num} allocations"
    if resumes:
        findings.warnings.append(f"{text} ({num - 1} requeues).")
    else:
        advice = "That needs --run.name NAME --run.resume auto; or raise the limit, or lower train.epochs."
        findings.refusals.append(f"{text}. {advice}")


def clock(seconds: float) -> str:
    """Seconds as [hours:]minutes:seconds, rounded up; below ten as seconds with decimals."""
    return f"{seconds:.2g} s" if seconds < 10 else tqdm.format_interval(math.ceil(seconds))
