"""Command line of `python -m cifar_dist.plan`. Does not import torch, so that wrong arguments are refused at once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from cifar_dist import cli
from cifar_dist.config import Config, Range
from cifar_dist.errors import UserError


@dataclass(frozen=True)
class PlanArguments:
    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """YAML file of the run."""
    nodes: int = 1
    """Number of nodes."""
    gpus: int = 1
    """Devices per node: GPUs, or processes with train.device cpu."""
    time_limit: str | None = None
    """As for sbatch: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    images_per_second: float | None = None
    """Training speed per device, as measured elsewhere."""
    like: Path | None = None
    """Directory of a finished run of the same network; take its training speed."""
    measure: bool = False
    """Measure training speed, and on a GPU memory, by some steps on a device of this machine."""
    json: Path | None = None
    """Also write the figures to this file."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(args: Sequence[str]) -> PlanArguments:
    """Parse the command line; its settings take precedence over those of the YAML file.

    Raises:
        UserError: a value is out of range, arguments contradict each other, or a file cannot be used.
    """
    # cli.parse expects a value after a boolean option.
    args = [
        "--measure=True" if word == "--measure" and following not in ("True", "False") else word
        for word, following in zip(args, [*args[1:], ""], strict=True)
    ]
    text = "Print what a run will do, and refuse a run that cannot work. Settings of cifar_dist.train may follow."
    file = cli.parse(PlanArguments, args, "plan", description=text).config
    from_file = PlanArguments(file, settings=cli.read_yaml(file, "plan"))
    arguments = replace(cli.parse(PlanArguments, args, "plan", from_file), config=file)
    for name, valid in (("nodes", Range(min=1)), ("gpus", Range(min=1)), ("images_per_second", Range(above=0))):
        value = getattr(arguments, name)
        if value is not None and (value not in valid or value == math.inf):
            raise UserError(f"{name} is {value}; valid: {valid}.")
    if (arguments.images_per_second is not None) + (arguments.like is not None) + arguments.measure > 1:
        raise UserError("the training speed has one source: give one of --images-per-second, --like and --measure.")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist.")
    return arguments


def time_limit_seconds(text: str) -> int:
    """A time limit in one of Slurm's forms, in seconds.

    Raises:
        UserError: it has another form, or is 0.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text, flags=re.ASCII)
    if not match:
        raise UserError(
            f"time_limit is {text}; valid are Slurm's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS."
        )
    numbers = [int(number) for number in match[2].split(":")]
    if match[1] is None and len(numbers) < 3:
        numbers.insert(0, 0)  # without days, one or two numbers start with minutes
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    total = ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"time_limit is {text}, which to Slurm means no limit; leave it out.")
    return total
