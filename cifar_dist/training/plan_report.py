"""A forecast as a page for the screen, as figures for JSON, and as a timeline for the picture."""

from __future__ import annotations

import textwrap
from typing import Any

from cifar_dist.config import NUM_TEST
from cifar_dist.tracking.schedule_curve import Timeline, text_curve
from cifar_dist.training.forecast import Forecast
from cifar_dist.training.memory import LEFT_OUT
from cifar_dist.training.objections import GIB, Objections
from cifar_dist.training.pace import Pace, clock, training_seconds

_LABEL, _WIDTH, _CURVE_WIDTH = 13, 110, 64


def page(plan: Forecast, pace: Pace | None, found: Objections, nodes: int, plain: bool = False) -> str:
    """About one screen of text; `plain` keeps the curve to ASCII."""
    config, schedule = plan.config, plan.schedule
    train, per_node = config.train, plan.world_size // nodes
    dropped = f"{plan.dropped_per_epoch} of {plan.train_n:,} samples dropped per epoch"
    small = schedule.low_resolution_steps
    rows = [
        ("network", f"{config.model.name}, {config.model.stem} stem, width {config.model.width:g}: {plan.params:,} "
                    f"parameters; {plan.precision}"),
        ("devices", f"{plan.world_size} ({nodes} node{'s' if nodes > 1 else ''} x {per_node}); batch of "
                    f"{train.batch_size} = {train.micro_batch_size} x {plan.world_size} x {plan.accumulation} "
                    f"(micro-batch x devices x accumulation)"),
        ("steps", f"{schedule.total_steps:,} in all = {plan.epochs:g} epochs of {schedule.steps_per_epoch}; {dropped}"
                  + (f"; the first {small:,} steps at 24 x 24 pixels" if small else "")),
        ("learning rate", "at the peak: " + ", ".join(f"{name} {peak:g}" for name, peak in plan.lr_peaks.items())),
        *(("", line) for line in [*_curve(plan, plain), *_points(plan)]),
        ("memory", _memory(plan)),
        ("time", _time(plan, pace)),
        *([("time limit", found.fits)] if found.fits else []),
        ("checkpoints", _checkpoints(plan)),
        ("scores", _scores(plan)),
    ]  # fmt: skip
    lines = [line for label, text in rows for line in _row(label, text)]
    return "\n".join([*lines, *(line for text in found.warnings for line in _row("warning:", text))])


def _row(label: str, text: str) -> list[str]:
    body = textwrap.wrap(text, _WIDTH - _LABEL - 1, break_on_hyphens=False, break_long_words=False) if label else [text]
    return [f"{label if k == 0 else '':<{_LABEL}} {line}".rstrip() for k, line in enumerate(body)]


def _curve(plan: Forecast, plain: bool) -> list[str]:
    """The learning rate over the steps, as a picture of characters with its axes."""
    lines = text_curve(plan.lr_shares, _CURVE_WIDTH, plain=plain)
    sides = ["100 %", *[""] * (len(lines) - 2), "0 %"]
    body = [f"{side:>6} |{line}" for side, line in zip(sides, lines, strict=True)]
    last = f"step {plan.schedule.total_steps:,}, epoch {plan.epochs:g}"
    return [*body, f"{'':<8}{'step 1':<{_CURVE_WIDTH - len(last)}}{last}"]


def points(plan: Forecast) -> dict[str, int]:
    """The steps, from 1, at which the learning rate is told: its start, its peak, the halves of that, and its end."""
    shares = plan.lr_shares
    top = shares.index(max(shares))
    rise = next(k for k, share in enumerate(shares) if share >= shares[top] / 2)
    fall = next((k for k in range(top, len(shares)) if shares[k] <= shares[top] / 2), None)
    found = {"start": 0, "half": rise, "peak": top, "half again": fall, "end": len(shares) - 1}
    return {name: k + 1 for name, k in found.items() if k is not None}


def _points(plan: Forecast) -> list[str]:
    where, peaks = points(plan), plan.lr_peaks
    first = max(8, *(len(name) for name in peaks))
    lines = ["".join([f"{'':<{first}}", *(f"{name:>12}" for name in where)])]
    lines.append("".join([f"{'at step':<{first}}", *(f"{step:>12,}" for step in where.values())]))
    for name, peak in peaks.items():
        rates = (peak * plan.lr_shares[step - 1] for step in where.values())
        lines.append("".join([f"{name:<{first}}", *(f"{rate:>12.3g}" for rate in rates)]))
    return lines


def _memory(plan: Forecast) -> str:
    m, train = plan.memory, plan.config.train
    average = f", moving average {_size(m.ema)}" if m.ema else ""
    return (
        f"{_size(m.peak)} per device at the peak (an estimate). Training {_size(m.training)}: parameters "
        f"{_size(m.parameters)}, gradients {_size(m.gradients)}, optimizer {_size(m.optimizer)}{average}, activations "
        f"of {train.micro_batch_size} images {_size(m.activations)}. Scoring {plan.config.eval.batch_size} images: "
        f"{_size(m.evaluation)}. Not counted: {LEFT_OUT}."
    )


def _time(plan: Forecast, pace: Pace | None) -> str:
    if pace is None:
        return "unknown; give --images-per-second RATE (per device), --like runs/NAME, or --measure"
    parts = [f"training {clock(training_seconds(pace, plan))} ({pace.source})"]
    if plan.schedule.low_resolution_steps and pace.small_step_seconds != pace.step_seconds:
        parts.append(f"a step {clock(pace.small_step_seconds)} at 24 x 24 pixels, then {clock(pace.step_seconds)}")
    else:
        parts.append(f"a step {clock(pace.step_seconds)}")
    start_up = "" if pace.startup_seconds is None else f"start-up {clock(pace.startup_seconds)}; "
    if pace.num_devices != plan.world_size > 1:
        parts.append(f"{plan.world_size} devices are taken for {plan.world_size} times as fast as one")
    return "; ".join(parts) + f"; {start_up}on top: {'' if start_up else 'start-up, '}validations, saving, final test"


def _checkpoints(plan: Forecast) -> str:
    c, train = plan.checkpoints, plan.config.train
    when = [f"every {train.checkpoint_every_steps:,} steps"] if len(plan.saves) > 1 else []
    when += ["at the end", *(["after a validation that is the best so far"] if plan.validations else [])]
    return (
        f"{_range(c.written)} written ({', '.join(when)}), {_range(c.kept)} kept, {c.size_bytes / 1e6:,.1f} MB each; "
        f"up to {c.disk_bytes / 1e6:,.1f} MB on disk"
    )


def _scores(plan: Forecast) -> str:
    settings, num = plan.config.eval, len(plan.validations)
    test = f"the test of {settings.test_subset or NUM_TEST:,} images"
    test += f" ({settings.tta} views)" if settings.tta != "none" else ""
    if not num:
        return f"no validation (data.train_on {plan.config.data.train_on}); {test} at the end"
    period = "epoch" if settings.every_epochs == 1 else f"{settings.every_epochs} epochs"
    every = f", every {period} and at the end" if num > 1 else ""
    return f"{num} validation{'s' if num > 1 else ''} of {plan.validation_n:,} images{every}; {test} at the end"


def _range(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]:,}" if numbers[0] == numbers[1] else f"{numbers[0]:,} to {numbers[1]:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def timeline(plan: Forecast) -> Timeline:
    events = {"validation": plan.validations, "scheduled checkpoint": plan.saves}
    schedule = plan.schedule
    return Timeline(
        plan.lr_shares, schedule.steps_per_epoch, plan.lr_peaks, {name: at for name, at in events.items() if at},
        schedule.low_resolution_steps,
    )  # fmt: skip


def figures(plan: Forecast, pace: Pace | None, found: Objections, nodes: int) -> dict[str, Any]:
    """All figures; what summary.json has too bears the same name. Seconds, bytes; `time` is None when unknown."""
    m, c, train = plan.memory, plan.checkpoints, plan.config.train
    known = pace and {
        "train_seconds": training_seconds(pace, plan),
        "step_seconds": pace.step_seconds,
        "low_resolution_step_seconds": pace.small_step_seconds,
        "startup_seconds": pace.startup_seconds,
        "source": pace.source,
    }
    rates = {
        name: {"step": step, **{group: peak * plan.lr_shares[step - 1] for group, peak in plan.lr_peaks.items()}}
        for name, step in points(plan).items()
    }
    return {
        "model": plan.config.model.name,
        "params": plan.params,
        "precision": plan.precision,
        "nodes": nodes,
        "world_size": plan.world_size,
        "batch_size": train.batch_size,
        "micro_batch_size": train.micro_batch_size,
        "accumulation": plan.accumulation,
        "train_n": plan.train_n,
        "steps": plan.schedule.total_steps,
        "steps_per_epoch": plan.schedule.steps_per_epoch,
        "epochs": plan.epochs,
        "samples_dropped_per_epoch": plan.dropped_per_epoch,
        "low_resolution_steps": plan.schedule.low_resolution_steps,
        "learning_rate": rates,
        "memory_bytes": {
            "peak": m.peak, "training": m.training, "parameters": m.parameters, "gradients": m.gradients,
            "optimizer": m.optimizer, "ema": m.ema, "activations": m.activations, "evaluation": m.evaluation,
            "left_out": LEFT_OUT,
        },
        "time": known,
        "checkpoints": {
            "written": list(c.written), "kept": list(c.kept), "size_bytes": c.size_bytes, "disk_bytes": c.disk_bytes,
        },
        "validations": plan.validations,
        "val_n": plan.validation_n or None,
        "warnings": found.warnings,
        "refusals": found.refusals,
    }  # fmt: skip
