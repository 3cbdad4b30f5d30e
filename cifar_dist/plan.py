"""What a run is going to be, before it is run: `python -m cifar_dist.plan CONFIG --nodes 2 --gpus 8`.

It refuses, with exit code 2, what cannot work, so that no allocation is spent on it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cifar_dist import cli, errors, files, limits
from cifar_dist.config import Config
from cifar_dist.errors import UserError

if TYPE_CHECKING:
    from cifar_dist.training.forecast import Forecast
    from cifar_dist.training.pace import Pace

_UNITS = {"days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
# Slurm's forms of a duration, by their colons, without and with days before.
_FORMS = {0: ("minutes",), 1: ("minutes", "seconds"), 2: ("hours", "minutes", "seconds")}
_FORMS_WITH_DAYS = {0: ("hours",), 1: ("hours", "minutes"), 2: ("hours", "minutes", "seconds")}


@dataclass(frozen=True)
class PlanArguments:
    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """The YAML file of the run."""
    nodes: int = 1
    """Machines."""
    gpus: int = 1
    """Devices of each machine: GPUs, or processes with train.device cpu."""
    time_limit: str | None = None
    """As for sbatch: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    images_per_second: float | None = None
    """A rate of training that was measured, per device."""
    like: Path | None = None
    """The directory of a finished run of the same network, whose rate is taken."""
    measure: bool = False
    """Measure the rate of this machine's device by some steps."""
    device_memory_gib: float | None = None
    """Memory of a device; refuse what needs more."""
    json: Path | None = None
    """Write the figures to this file, too."""
    picture: Path | None = None
    """Draw the learning rate and what happens when into this PNG."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main() -> None:
    """Print the plan that the command line asks for; exit with 2 when it cannot work."""
    with errors.reported():
        arguments = parse(sys.argv[1:])
        config, world_size = arguments.settings, arguments.nodes * arguments.gpus
        limit = None if arguments.time_limit is None else time_limit_seconds(arguments.time_limit)
        limits.validate(config)
        limits.accumulation_steps(config.train.batch_size, config.train.micro_batch_size, world_size)
        if config.train.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        _plan(arguments, limit)


def parse(args: Sequence[str]) -> PlanArguments:
    """The arguments, with the settings of the file under those of the command line.

    Raises:
        UserError: one contradicts another or is out of range, or the file cannot be used.
    """
    args = [f"{word}=True" if word == "--measure" and args[k + 1 : k + 2] not in (["True"], ["False"]) else word
            for k, word in enumerate(args)]  # fmt: skip
    text = "What a run is going to be, before it is run. Settings of cifar_dist.train may follow."
    file = cli.parse(PlanArguments, args, "plan", description=text).config
    default = PlanArguments(file, settings=cli.read_yaml(file, "plan"))
    arguments = replace(cli.parse(PlanArguments, args, "plan", default), config=file)
    for name in ("nodes", "gpus"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}; valid: 1 or more.")
    for name in ("images_per_second", "device_memory_gib"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}; valid: above 0.")
    sources = [arguments.images_per_second is not None, arguments.like is not None, arguments.measure]
    if sum(sources) > 1:
        raise UserError("the time comes from one source: give one of --images-per-second, --like and --measure.")
    for path in (arguments.json, arguments.picture):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist.")
    return arguments


def time_limit_seconds(text: str) -> int:
    """A duration as Slurm writes it, in seconds.

    Raises:
        UserError: it is none, or zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text, flags=re.ASCII)
    if not match:
        raise UserError(
            f"time_limit is {text}; valid are Slurm's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS."
        )
    days, rest = match[1], match[2].split(":")
    units = (_FORMS if days is None else _FORMS_WITH_DAYS)[len(rest) - 1]
    seconds = int(days or 0) * _UNITS["days"]
    seconds += sum(int(number) * _UNITS[unit] for number, unit in zip(rest, units, strict=True))
    if seconds == 0:
        raise UserError(f"time_limit is {text}, which means no limit to Slurm; leave it out then.")
    return seconds


def _plan(arguments: PlanArguments, limit_seconds: int | None) -> None:
    # torch is imported only now, so that --help and mistakes are answered at once.
    from cifar_dist.tracking.schedule_curve import draw_timeline
    from cifar_dist.training import forecast, objections, plan_report

    plan = forecast.forecast(arguments.settings, arguments.nodes * arguments.gpus)
    pace = _pace(arguments, plan)
    memory = None if arguments.device_memory_gib is None else arguments.device_memory_gib * objections.GIB
    found = objections.objections(plan, pace, limit_seconds, memory)
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    print(plan_report.page(plan, pace, found, arguments.nodes, plain), flush=True)
    if arguments.picture is not None:
        devices = f"{plan.world_size} device{'s' if plan.world_size > 1 else ''}"
        title = f"{arguments.config.name} on {devices}: {plan.schedule.total_steps:,} steps in {plan.epochs:g} epochs"
        draw_timeline(plan_report.timeline(plan), arguments.picture, title)
    if arguments.json is not None:
        text = json.dumps(plan_report.figures(plan, pace, found, arguments.nodes), indent=2, allow_nan=False)
        try:
            files.write_text_atomic(arguments.json, text + "\n")
        except OSError as error:
            raise UserError(f"json {arguments.json} cannot be written: {error.strerror}.") from None
    if found.refusals:
        raise UserError("\nerror: ".join(found.refusals))


def _pace(arguments: PlanArguments, plan: Forecast) -> Pace | None:
    from cifar_dist.training import pace

    if arguments.images_per_second is not None:
        return pace.given(arguments.images_per_second, plan)
    if arguments.like is not None:
        return pace.like(arguments.like, plan)
    return pace.measure(plan) if arguments.measure else None


if __name__ == "__main__":
    main()
