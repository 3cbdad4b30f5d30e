"""Train a configuration with several seeds, or over a grid of settings: `python -m cifar_dist.sweep CONFIG N`.

launch/seeds and launch/sweep set up the environment first.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from cifar_dist import cli
from cifar_dist.cluster import grid, local_sweep
from cifar_dist.config import Config, Range
from cifar_dist.errors import UserError, exit_on_error
from cifar_dist.process import run_and_exit


@dataclass(frozen=True)
class OwnArguments:
    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """YAML file, or the name of a configuration of this project, such as quickstart."""
    seeds: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="N"), Range(min=1, max=9999)] = 1
    """Number of seeds."""
    first_seed: Annotated[int, Range(min=0, max=10**18)] = 0
    """The first of the seeds."""
    grid: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE,VALUE ... for every combination, or a file with a line of settings each."""


@dataclass(frozen=True)
class SweepArguments(OwnArguments):
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main() -> None:
    """Train all runs, print their table and write seeds.json."""
    with exit_on_error():
        arguments = parse(sys.argv[1:])
        lines, config = grid.settings([*itertools.chain(*arguments.grid)]), arguments.settings
        kind = "sweep" if arguments.grid else "seeds"
        name = config.run.name or f"{Path(arguments.config).name.removesuffix('.yaml')}-{kind}"
        first = arguments.first_seed
        local_sweep.run_sweep(config, name, lines, range(first, first + arguments.seeds))


def parse(args: Sequence[str]) -> SweepArguments:
    """The arguments; settings on the command line take precedence over those of the YAML file."""
    for name in ("run.seed", "run.resume"):
        if {f"--{name}"} & {word.partition("=")[0] for word in args}:
            raise UserError(f"--{name} is set for each run of a sweep; --first-seed K chooses other seeds.")
    text = (
        "Train with several seeds or over a grid, one run after another. All settings of cifar_dist.train may follow; "
        "`python -m cifar_dist.train --help` lists them. "
        "Example: python -m cifar_dist.sweep quickstart 3 --grid optim.lr=0.1,0.2 --data.train_on train"
    )
    if {"-h", "--help"} & {*args}:
        cli.parse(OwnArguments, ["--help"], "sweep", description=text)  # without 200 lines of settings
    name = cli.parse(SweepArguments, args, "sweep").config
    from_file = SweepArguments(name, settings=cli.read_yaml(name, "sweep"))
    arguments = replace(cli.parse(SweepArguments, args, "sweep", from_file), config=name)
    cli.validate(arguments.settings)  # first, since it names these without "settings."
    cli.validate_ranges(arguments)
    if isinstance(arguments.settings.run.resume, Path):
        raise UserError(
            f"{name} sets run.resume to a path, but it is set for each run of a sweep. To start from the weights of a "
            "run: --model.weights PATH."
        )
    return arguments


if __name__ == "__main__":
    run_and_exit(main, needs_output=False)
