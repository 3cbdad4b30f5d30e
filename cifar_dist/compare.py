"""Where runs first differ, in which settings, and their figures: `python -m cifar_dist.compare runs/A runs/B`.

The exit code is 0 if all are finished and equal, 2 if the arguments are wrong, else 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cifar_dist import cli, errors
from cifar_dist.process import run_and_exit
from cifar_dist.reports import compare, curves_of_runs, side_by_side
from cifar_dist.reports.run_table import printable


@dataclass(frozen=True)
class CompareArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, two or more, finished or not. Each is compared with the first."""
    plot: Path | None = None
    """Also draw the curves of all runs over each other into this PNG file."""


def main() -> None:
    """Print a table of the runs, for each EQUAL, UNDECIDED or the first differences, and the figures side by side."""
    with errors.exit_on_error():
        text = "Whether runs computed the same, to the bit. Example: python -m cifar_dist.compare runs/mine runs/other"
        arguments = cli.parse(CompareArguments, sys.argv[1:], "compare", description=text)
        runs = arguments.runs
        compare.refuse(runs)
        if arguments.plot is not None and arguments.plot.suffix.lower() != ".png":  # it is replaced
            raise errors.UserError(f"--plot {arguments.plot} must end in .png.")
        if arguments.plot is not None:  # before the comparison, which takes seconds
            with errors.explain_os_error(f"--plot {arguments.plot} cannot be written"):
                curves_of_runs.draw(dict(zip(side_by_side.names(runs), runs, strict=True)), arguments.plot)
        print(f"{compare.table(runs)}\n")
        equal = [_compare(runs[0], other) for other in runs[1:]]
        print(f"\n{side_by_side.figures(runs)}")
    raise SystemExit(0 if all(equal) else 1)


def _compare(first: Path, second: Path) -> bool:
    found, missing = list(compare.differences(first, second)), compare.undecided(first, second)
    verdict = "DIFFERENT" if found else f"UNDECIDED, what both have is equal; {missing}" if missing else "EQUAL"
    print(f"{first} and {second}: {verdict}")
    for line in found:
        print(f"  {printable(line)}")
    causes, others = compare.settings(first, second)
    for line in (*causes, *compare.other_causes(first, second)) if found else ():
        print(f"  possible cause: {printable(line)}")
    if not found:
        others = causes + others
    if others:
        effect = " without an effect" if not (found or missing) else ""
        print(f"  other settings{effect}: {printable('; '.join(others))}")
    return not (found or missing)


if __name__ == "__main__":
    run_and_exit(main)
