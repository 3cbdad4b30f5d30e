"""All runs of a folder, with their states: `python -m cifar_dist.runs`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from cifar_dist import cli, errors
from cifar_dist.process import run_and_exit
from cifar_dist.reports import run_table
from cifar_dist.reports.run_state import State


@dataclass(frozen=True)
class RunsArguments:
    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder of runs, which may lie several levels below it, or a run directory."""
    sort: run_table.Column = "changed"
    """Column to sort by. Runs without a value come last."""
    descending: bool = False
    """Greatest values first."""
    state: tuple[State, ...] = ()
    """Only runs in these states, such as `--state running killed`."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """csv and jsonl (one JSON object per line): accuracies as fractions, times in seconds."""


def main() -> None:
    """Print a line per run."""
    with errors.exit_on_error():
        text = "List the runs of a folder. Example: python -m cifar_dist.runs runs --sort accuracy --descending True"
        arguments = cli.parse(RunsArguments, sys.argv[1:], "runs", description=text)
        found = run_table.sort(run_table.read(arguments.folder), arguments.sort, arguments.descending)
        if arguments.state:
            found = replace(found, runs=[run for run in found.runs if run.state in arguments.state])
        if found.runs or arguments.format == "table":
            print(run_table.as_text(found, arguments.format))


if __name__ == "__main__":
    run_and_exit(main)
