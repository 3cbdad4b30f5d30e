"""Mean and spread over runs that differ only in the seed: `python -m cifar_dist.seeds runs/NAME`.

`launch/seeds` trains such runs one after another and ends with this command.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cifar_dist import cli, errors
from cifar_dist.errors import UserError
from cifar_dist.process import run_and_exit
from cifar_dist.reports import finished_runs, seeds


@dataclass(frozen=True)
class SeedsArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, their summary.json, or folders of run directories."""
    json: Path | None = None
    """Also write the figures to this file."""


def main() -> None:
    """Print the table, and write its figures."""
    with errors.exit_on_error():
        text = "Mean and spread of runs over seeds. Example: python -m cifar_dist.seeds runs/quickstart-seeds"
        arguments = cli.parse(SeedsArguments, sys.argv[1:], "seeds", description=text)
        if not arguments.runs:
            raise UserError("no run is given. Name run directories, or a folder of them.")
        write_json = cli.json_writer(arguments.json)
        runs = finished_runs.read_runs(arguments.runs)
        print(seeds.table(runs))
        write_json(seeds.report(runs))


if __name__ == "__main__":
    run_and_exit(main)
