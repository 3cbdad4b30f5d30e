"""What speaks against a run before it is started: what cannot work, and what may surprise."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from cifar_dist.data import dataset
from cifar_dist.training import checkpoint
from cifar_dist.training.forecast import Forecast
from cifar_dist.training.pace import NOTICE_S, Pace, allocations, clock
from cifar_dist.training.run_directory import directory_of, holds_run

GIB = 2**30
_NOTICE = f"the last {NOTICE_S} s, in which slurm/train.sh ends a run,"


@dataclass
class Objections:
    """Messages for the user: why the run cannot work, what else to know, and how it fits into the time limit."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fits: str | None = None


def objections(
    plan: Forecast, pace: Pace | None, limit_seconds: int | None, device_memory_bytes: float | None
) -> Objections:
    """Hold a run against this machine, a time limit and a device's memory; None: not known."""
    found = Objections()
    _warm_up(plan, found)
    _dataset(plan.config.data.dir, found)
    _run_directory(plan, found)
    if device_memory_bytes is not None:
        _memory(plan, device_memory_bytes, found)
    if limit_seconds is not None and pace is None:
        found.warnings.append("the time limit is not checked, since the time is unknown.")
    if limit_seconds is not None and pace is not None:
        _time(plan, pace, limit_seconds, found)
    return found


def _memory(plan: Forecast, device_bytes: float, found: Objections) -> None:
    memory = plan.memory
    needs = {"train.micro_batch_size": memory.training, "eval.batch_size": memory.evaluation}
    too_large = [name for name, num_bytes in needs.items() if num_bytes > device_bytes]
    if too_large:
        found.refusals.append(
            f"a device has {device_bytes / GIB:.3g} GiB, but some {memory.peak / GIB:.3g} GiB are needed. Lower "
            f"{' and '.join(too_large)}."
        )


def _warm_up(plan: Forecast, found: Objections) -> None:
    optim, total, highest = plan.config.optim, plan.schedule.total_steps, max(plan.lr_shares)
    if highest < 1:
        share = round(optim.warmup_share * total)
        found.warnings.append(
            f"the learning rate rises to {highest:.0%} of its peak only: optim.warmup_min_steps is "
            f"{optim.warmup_min_steps}, but after {share} of {total} steps (optim.warmup_share) it is to fall again."
        )


def _dataset(folder: Path, found: Objections) -> None:
    missing = [name for name in (*dataset.COUNTS, dataset.MANIFEST) if not (folder / name).exists()]
    if missing:
        found.warnings.append(
            f"no dataset in {folder} on this machine ({', '.join(missing)} missing). Training prepares it at its "
            f"start, which needs the internet; now: python -m cifar_dist.prepare --data.dir {folder}"
        )


def _run_directory(plan: Forecast, found: Objections) -> None:
    directory = directory_of(plan.config)
    try:
        if plan.config.run.resume != "auto" and holds_run(directory):
            found.refusals.append(
                f"the run directory {directory} already holds a run. Go on with it by --run.resume auto, or choose "
                f"another --run.name."
            )
        place = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise NotADirectoryError(errno.EACCES, f"{place} is no folder that can be written")
        folder = directory / "checkpoints"
        there = sum(checkpoint.path_of(folder, step).stat().st_size for step in checkpoint.all_steps(folder))
        room = shutil.disk_usage(place).free + there
    except OSError as error:
        found.refusals.append(
            f"the run directory {directory} cannot be used: {error.strerror}. Choose another --run.dir."
        )
        return
    if room < plan.checkpoints.disk_bytes:
        found.refusals.append(
            f"{place} has {room / 1e6:,.0f} MB left, but the checkpoints need {plan.checkpoints.disk_bytes / 1e6:,.0f} "
            f"MB. Make room, lower train.keep_checkpoints, or choose another --run.dir."
        )


def _time(plan: Forecast, pace: Pace, limit_seconds: int, found: Objections) -> None:
    fit = allocations(pace, plan, limit_seconds)
    limit = f"the time limit {clock(limit_seconds)}, less {_NOTICE}"
    if fit.num is None:
        needed = f"start-up and one step take {clock((pace.startup_seconds or 0) + pace.step_seconds)}"
        found.refusals.append(
            f"{limit} leaves no time for a single step: {needed}. The whole run takes {clock(fit.needed_seconds)}; "
            f"raise the limit."
        )
    elif fit.num == 1:
        spare = clock(limit_seconds - NOTICE_S - fit.needed_seconds)
        found.fits = f"{clock(limit_seconds)}, of which {spare} are left; {_NOTICE} are not counted"
    else:
        start_up = "start-up and training take" if pace.startup_seconds is not None else "training alone takes"
        fits = f"One allocation has room for {fit.epochs} of {plan.epochs:g} epochs"
        text = f"{limit} is too short: {start_up} {clock(fit.needed_seconds)}."
        if plan.config.run.resume == "auto":
            found.warnings.append(f"{text} The run goes over {fit.num} allocations ({fit.num - 1} requeues). {fits}.")
        else:
            found.refusals.append(
                f"{text} {fits}. With --run.name NAME --run.resume auto it goes over {fit.num} allocations "
                f"({fit.num - 1} requeues); or raise the limit, or lower train.epochs."
            )
