"""A plan as one screen of text."""

import textwrap

from cifar_dist.config import NUM_TEST, Config
from cifar_dist.planning.plan import Figures, Findings, TrainingTime, clock

_LABEL, _WIDTH = 14, 110


def page(config: Config, plan: Figures, time: TrainingTime | None, findings: Findings) -> str:
    """The plan without the refusals."""
    model, low, memory = config.model, plan["low_resolution_steps"], time and time.peak_memory_bytes
    network = f"{model.name}, {model.stem} stem, width {model.width:g}: {plan['params']:,} parameters"
    devices = "{world_size} = {nodes} x {gpus} (nodes x devices); batch of {batch_size} = "
    devices += "{micro_batch_size} x {world_size} x {accumulation} (micro-batch x devices x accumulation)"
    steps = "{steps:,} in all = {epochs:g} epochs of {steps_per_epoch}; "
    steps += "{samples_dropped_per_epoch} of {train_n:,} samples dropped per epoch"
    rows = [
        ("network", f"{network}; {plan['precision']}"),
        ("devices", devices.format(gpus=plan["world_size"] // plan["nodes"], **plan)),
        ("steps", steps.format(**plan) + (f"; the first {low:,} steps at 24 x 24 pixels" if low else "")),
        *_learning_rates(plan),
        ("memory", f"{memory / 2**30:.2f} GiB per GPU (torch.cuda.max_memory_allocated)" if memory else ""),
        ("time", _time(plan, time)),
        ("time limit", findings.time_limit or ""),
        ("checkpoints", _checkpoints(config, plan)),
        ("scores", _scores(config, plan)),
        *(("warning:", text) for text in findings.warnings),
    ]
    return "\n".join(_row(label, text) for label, text in rows if text)


def _row(label: str, text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH - _LABEL, break_on_hyphens=False, break_long_words=False)
    return f"{label:<{_LABEL}}" + f"\n{'':<{_LABEL}}".join(lines)


def _learning_rates(plan: Figures) -> list[tuple[str, str]]:
    """A column for each point of the schedule, a row for each parameter group."""
    points = plan["learning_rate"]
    lines = [" " * 18 + "".join(f"{point:>12}" for point in points)]
    for name in points["start"]:
        number = ",d" if name == "step" else ".3g"
        lines.append(f"{name:<18}" + "".join(f"{rates[name]:>12{number}}" for rates in points.values()))
    return list(zip(["learning rate", *[""] * len(points)], lines, strict=False))


def _time(plan: Figures, time: TrainingTime | None) -> str:
    if time is None:
        return "unknown; give --images-per-second SPEED (per device), --like runs/NAME, or --measure"
    text = f"training {clock(time.train_seconds)} ({time.source}); {clock(time.step_seconds)} per step on average"
    if time.num_devices != plan["world_size"] > 1:
        text += "; {world_size} devices are assumed to be {world_size} times as fast as one".format(**plan)
    if time.startup_seconds is None:
        return f"{text}; not included: start-up, validations, saving, final test"
    return f"{text}; start-up {clock(time.startup_seconds)}; not included: validations, saving, final test"


def _checkpoints(config: Config, plan: Figures) -> str:
    every = config.train.checkpoint_every_steps
    when = f"every {every:,} steps, at the end" if 0 < every < plan["steps"] else "at the end"
    when += ", after each best validation so far" * bool(plan["validations"])
    return (
        f"at most {plan['checkpoints_written']:,} written ({when}), {plan['checkpoints_kept']:,} kept, "
        f"{plan['checkpoint_bytes'] / 1e6:,.1f} MB each; up to {plan['checkpoints_bytes'] / 1e6:,.1f} MB on disk"
    )


def _scores(config: Config, plan: Figures) -> str:
    settings, num = config.eval, len(plan["validations"])
    test = f"the test of {settings.test_subset or NUM_TEST:,} images at the end (eval.tta {settings.tta})"
    if not num:
        return f"no validation (data.train_on {config.data.train_on}); {test}"
    when = f"every {settings.every_epochs} epochs and at the end" if num > 1 else "at the end"
    return f"{num} x validation on {plan['val_n']:,} images ({when}); {test}"
