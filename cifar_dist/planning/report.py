"""A plan as one screen of text, and as figures for JSON."""

from __future__ import annotations

import textwrap
from typing import Any

from cifar_dist.config import NUM_TEST
from cifar_dist.planning.duration import StepTime, clock
from cifar_dist.planning.plan import Findings, Plan

_LABEL, _WIDTH = 13, 110


def page(plan: Plan, step_time: StepTime | None, findings: Findings) -> str:
    """About one screen of text, without the refusals."""
    config, schedule, train = plan.config, plan.schedule, plan.config.train
    memory, low = step_time and step_time.memory_bytes, schedule.low_resolution_steps
    rows = [
        ("network", f"{config.model.name}, {config.model.stem} stem, width {config.model.width:g}: {plan.params:,} "
                    f"parameters; {plan.precision}"),
        ("devices", f"{plan.world_size} ({plan.nodes} node{'s' * (plan.nodes > 1)} x {plan.world_size // plan.nodes}); "
                    f"batch of {train.batch_size} = {train.micro_batch_size} x {plan.world_size} x "
                    f"{plan.accumulation} (micro-batch x devices x accumulation)"),
        ("steps", f"{schedule.total_steps:,} in all = {plan.epochs:g} epochs of {schedule.steps_per_epoch}; "
                  f"{plan.dropped_per_epoch} of {plan.train_n:,} samples dropped per epoch"
                  + (f"; the first {low:,} steps at 24 x 24 pixels" if low else "")),
        *(("" if k else "learning rate", line) for k, line in enumerate(_rates(plan))),
        ("memory", f"{memory / 2**30:.2f} GiB per GPU at the peak of a step (torch.cuda.max_memory_allocated)"
                   if memory else ""),
        ("time", _time(plan, step_time)),
        ("time limit", findings.time_limit or ""),
        ("checkpoints", _checkpoints(plan)),
        ("scores", _scores(plan)),
        *(("warning:", text) for text in findings.warnings),
    ]  # fmt: skip
    return "\n".join(line for label, text in rows if text for line in _row(label, text))


def _row(label: str, text: str) -> list[str]:
    table = label in ("", "learning rate")  # its columns are aligned by spaces
    lines = [text] if table else textwrap.wrap(text, _WIDTH - _LABEL, break_on_hyphens=False, break_long_words=False)
    return [f"{'' if k else label:<{_LABEL}} {line}" for k, line in enumerate(lines)]


def _rates(plan: Plan) -> list[str]:
    """Learning rates at a few steps, one line per parameter group."""
    points = plan.lr_points()
    width = max(map(len, plan.lr_peaks))
    cells = [("", list(points)), ("step", [f"{step:,}" for step in points.values()])]
    for name, peak in plan.lr_peaks.items():
        cells.append((name, [f"{peak * plan.lr_fraction(step):.3g}" for step in points.values()]))
    return [f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in row) for name, row in cells]


def _time(plan: Plan, step_time: StepTime | None) -> str:
    if step_time is None:
        return "unknown; give --images-per-second SPEED (per device), --like runs/NAME, or --measure"
    step = f"a step {clock(step_time.seconds)}"
    if plan.schedule.low_resolution_steps and step_time.low_resolution_seconds != step_time.seconds:
        step += f", at 24 x 24 pixels {clock(step_time.low_resolution_seconds)}"
    parts = [f"training {clock(step_time.training_seconds(plan))} ({step_time.source})", step]
    if step_time.num_devices != plan.world_size > 1:
        parts.append(f"{plan.world_size} devices are assumed to be {plan.world_size} times as fast as one")
    if step_time.startup_seconds is None:
        parts.append("not included: start-up, validations, saving, final test")
    else:
        parts.append(f"start-up {clock(step_time.startup_seconds)}; not included: validations, saving, final test")
    return "; ".join(parts)


def _checkpoints(plan: Plan) -> str:
    c, every = plan.checkpoints, f"every {plan.config.train.checkpoint_every_steps:,} steps"
    when = [every] * (len(plan.saves) > 1) + ["at the end"]
    when += ["after each best validation so far"] * bool(plan.validations)
    return (
        f"{_range(c.written)} written ({', '.join(when)}), {_range(c.kept)} kept, {c.size_bytes / 1e6:,.1f} MB each; "
        f"up to {c.disk_bytes / 1e6:,.1f} MB on disk"
    )


def _range(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]:,}" if numbers[0] == numbers[1] else f"{numbers[0]:,} to {numbers[1]:,}"


def _scores(plan: Plan) -> str:
    settings, num = plan.config.eval, len(plan.validations)
    test = f"the test of {settings.test_subset or NUM_TEST:,} images"
    test += f" ({settings.tta} views)" if settings.tta != "none" else ""
    if not num:
        return f"no validation (data.train_on {plan.config.data.train_on}); {test} at the end"
    every = f", every {settings.every_epochs} epochs and at the end" if num > 1 else ""
    every = every.replace("every 1 epochs", "every epoch")
    return f"{num} validation{'s' * (num > 1)} of {plan.validation_n:,} images{every}; {test} at the end"


def figures(plan: Plan, step_time: StepTime | None, findings: Findings) -> dict[str, Any]:
    """All figures, named as in summary.json where it has them. Seconds and bytes; None: not known."""
    train, c = plan.config.train, plan.checkpoints
    rates = {
        name: {"step": step} | {group: peak * plan.lr_fraction(step) for group, peak in plan.lr_peaks.items()}
        for name, step in plan.lr_points().items()
    }
    return {
        "model": plan.config.model.name,
        "params": plan.params,
        "precision": plan.precision,
        "nodes": plan.nodes,
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
        "memory_bytes": step_time and step_time.memory_bytes and {"peak": step_time.memory_bytes},
        "time": step_time and {
            "train_seconds": step_time.training_seconds(plan),
            "step_seconds": step_time.seconds,
            "low_resolution_step_seconds": step_time.low_resolution_seconds,
            "startup_seconds": step_time.startup_seconds,
            "source": step_time.source,
        },
        "checkpoints": {
            "written": c.written, "kept": c.kept, "size_bytes": c.size_bytes, "disk_bytes": c.disk_bytes,
        },
        "validations": plan.validations,
        "val_n": plan.validation_n or None,
        "warnings": findings.warnings,
        "refusals": findings.refusals,
    }  # fmt: skip
