"""A plan as one screen of text."""

import textwrap
from itertools import zip_longest

from cifar_dist.cli import aligned
from cifar_dist.config import NUM_TEST, Config
from cifar_dist.planning.plan import Figures, Findings, TrainingTime, clock


def page(config: Config, plan: Figures, time: TrainingTime | None, findings: Findings) -> str:
    """The plan without the refusals."""
    model, low, memory = config.model, plan["low_resolution_steps"], time and time.peak_memory_bytes
    network = f"{model.title}: {plan['params']:,} parameters"
    devices = "{world_size} = {nodes} x {gpus} (nodes x devices); batch of {batch_size} = "
    devices += "{micro_batch_size} x {world_size} x {accumulation} (micro-batch x devices x accumulation)"
    steps = "{steps:,} in all = {epochs:g} epochs of {steps_per_epoch}; "
    steps += "{samples_dropped_per_epoch} of {train_n:,} samples dropped per epoch"
    checkpoints = "at most {checkpoints_written:,} written, {checkpoints_kept:,} kept, {each:,.1f} MB each; "
    checkpoints += "up to {together:,.1f} MB on disk"
    sizes = {"each": plan["checkpoint_bytes"] / 1e6, "together": plan["checkpoints_bytes"] / 1e6}
    num = len(plan["validations"])
    validations = f"{num} x validation on {plan['val_n']:,} images" if num else "no validation"
    test = f"test of {config.eval.test_subset or NUM_TEST:,} images at the end (eval.tta {config.eval.tta})"
    rows = [
        ("network", f"{network}; {plan['precision']}"),
        ("devices", devices.format(gpus=plan["world_size"] // plan["nodes"], **plan)),
        ("steps", steps.format(**plan) + (f"; the first {low:,} steps with small images" if low else "")),
        *zip_longest(["learning rate"], _learning_rates(plan), fillvalue=""),
        ("memory", f"{memory / 2**30:.2f} GiB per GPU (torch.cuda.max_memory_allocated)" if memory else ""),
        ("time", _time(plan, time)),
        ("time limit", findings.time_limit or ""),
        ("checkpoints", checkpoints.format(**plan, **sizes)),
        ("scores", f"{validations}; {test}"),
        *(("warning:", text) for text in findings.warnings),
    ]
    lines = textwrap.TextWrapper(110, subsequent_indent=" " * 14, break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines.fill(f"{label:<14}{text}") for label, text in rows if text)


def _learning_rates(plan: Figures) -> list[str]:
    """A column for each point of the schedule, a row for each parameter group."""
    points = plan["learning_rate"]
    rows = [["", *points]]
    for name in points["start"]:
        number = ",d" if name == "step" else ".3g"
        rows.append([name, *(format(rates[name], number) for rates in points.values())])
    return aligned(rows)


def _time(plan: Figures, time: TrainingTime | None) -> str:
    if time is None:
        return "unknown; give --images-per-second SPEED (per device) or --measure"
    text = f"training {clock(time.train_seconds)} ({time.source}); {clock(time.step_seconds)} per step on average"
    if plan["world_size"] > 1:
        text += "; {world_size} devices are assumed to be {world_size} times as fast as one".format(**plan)
    return f"{text}; not included: start-up, validations, saving, final test"
