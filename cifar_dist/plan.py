"""Print what a run will do, and refuse a run that cannot work: `python -m cifar_dist.plan CONFIG --nodes 2 --gpus 8`.

The exit code is 2 for a refusal, so that no allocation is spent on it.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from cifar_dist import cli, errors, options
from cifar_dist.config import Config, Positive, Range
from cifar_dist.errors import UserError
from cifar_dist.process import run_and_exit


@dataclass(frozen=True)
class OwnArguments:
    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """YAML file of the run, or the name of a configuration of this project, such as googlenet."""
    nodes: Positive = 1
    """Number of nodes."""
    gpus: Positive = 1
    """Devices per node: GPUs, or processes with train.device cpu."""
    time_limit: str | None = None
    """As for sbatch: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    images_per_second: Annotated[float, Range(above=0, below=math.inf)] | None = None
    """Training speed per device, as measured elsewhere: `images_per_second` divided by `world_size` in the
    summary.json of a run of the same network."""
    measure: bool = False
    """Measure training speed, and on a GPU memory, with some steps on a device of this machine."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class PlanArguments(OwnArguments):
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main() -> None:
    """Plan the run that the command line describes."""
    with errors.exit_on_error():
        arguments = parse(sys.argv[1:])
        config, num_devices = arguments.settings, arguments.nodes * arguments.gpus
        limit = None if arguments.time_limit is None else time_limit_seconds(arguments.time_limit)
        cli.accumulation_steps(config.train.batch_size, config.train.micro_batch_size, num_devices)
        write_json = cli.json_writer(arguments.json)
        if config.train.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Here, not at the top: importing torch takes seconds, and --help and wrong arguments do not need it.
        from cifar_dist.planning import plan, report

        planned, time = plan.make_plan(config, arguments.nodes, arguments.gpus), None
        if arguments.images_per_second is not None:
            time = plan.from_speed(arguments.images_per_second, planned)
        elif arguments.measure:
            time = plan.measure(config, planned)
        findings = plan.check(config, planned)
        if limit is not None:
            plan.check_time_limit(time, limit, config.run.resume == "auto", findings)
        print(report.page(config, planned, time, findings), flush=True)
        write_json(planned | {"time": time and asdict(time)} | asdict(findings))
        if findings.refusals:
            raise UserError("\nerror: ".join(findings.refusals))


def parse(args: Sequence[str]) -> PlanArguments:
    """The arguments; settings on the command line take precedence over those of the YAML file."""
    # cli.parse expects a value after a boolean option; here it may be left out.
    measure = zip(args, [*args[1:], ""], strict=True)
    args = ["--measure=True" if a == "--measure" and b.lower() not in options.SWITCH else a for a, b in measure]
    text = (
        "Print what a run will do, and refuse a run that cannot work. All settings of cifar_dist.train may follow; "
        "`python -m cifar_dist.train --help` lists them. "
        "Example: python -m cifar_dist.plan googlenet --nodes 2 --gpus 8"
    )
    if {"-h", "--help"} & {*args}:
        cli.parse(OwnArguments, ["--help"], "plan", description=text)  # without 200 lines of settings
    file = cli.parse(PlanArguments, args, "plan").config
    from_file = PlanArguments(file, settings=cli.read_yaml(file, "plan"))
    arguments = replace(cli.parse(PlanArguments, args, "plan", from_file), config=file)
    cli.validate(arguments.settings)  # first, since it names these without "settings."
    cli.validate_ranges(arguments)
    if arguments.images_per_second is not None and arguments.measure:
        raise UserError("the training speed has one source: give either --images-per-second or --measure.")
    return arguments


def time_limit_seconds(text: str) -> int:
    """A time limit in one of Slurm's forms, in seconds; UserError for another form, and for 0."""
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


if __name__ == "__main__":
    run_and_exit(main)
