"""Runs as one HTML file to look at: `python -m cifar_dist.report runs/NAME`.

For runs of this package, finished or not, and for runs of other programs that W&B recorded offline. Does not import
torch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cifar_dist import cli, errors
from cifar_dist.errors import UserError
from cifar_dist.process import run_and_exit
from cifar_dist.reports import comparison, finished_runs, markup, run_data, run_report, wandb_folder
from cifar_dist.reports.run_data import RunData


@dataclass(frozen=True)
class ReportArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, folders of them, and folders or .wandb files of W&B's offline runs, of any program."""
    out: Path | None = None
    """The file to write. None: report.html in the run directory; for several runs, and for W&B's, in this folder."""


def main() -> None:
    """Write the page, and print its path."""
    with errors.exit_on_error():
        text = (
            "Write runs as one HTML file that needs no network: scores, curves, mistakes, settings. Several runs are "
            "shown side by side. Example: python -m cifar_dist.report runs/mine"
        )
        arguments = cli.parse(ReportArguments, sys.argv[1:], "report", description=text)
        if not arguments.runs:
            raise UserError("no run is given. Name run directories, or W&B's offline folders.")
        runs = [run for path in arguments.runs for run in _read(path)]
        own = len(runs) == 1 and not runs[0].facts
        out = arguments.out or (runs[0].directory if own else Path()) / "report.html"
        if len(runs) > 1:
            page = comparison.page_of_runs(runs)
        else:
            page = run_report.page_of(runs[0]) if own else comparison.page_of_foreign_run(runs[0])
        markup.save(out, page)
        print(f"{out} ({out.stat().st_size / 1000:,.0f} kB)")


def _read(path: Path) -> list[RunData]:
    """The runs that `path` names."""
    with errors.explain_os_error(f"{path} cannot be read"):
        directories = finished_runs.run_directories([path])
        if not any(map(run_data.is_run, directories)) and (files := wandb_folder.files_in(path)):
            return wandb_folder.read_runs(files)
        found = list(filter(run_data.is_run, directories)) or directories  # `read` says what is missing
        if len(found) < len(directories):
            others = ", ".join(str(directory) for directory in directories if directory not in found)
            print(f"left out, because neither metrics.jsonl, status.json nor summary.json is there: {others}")
        return [run_data.read(directory) for directory in found]


if __name__ == "__main__":
    run_and_exit(main)
