"""Whether runs computed the same, and where they first differ: `python -m cifar_dist.compare runs/A runs/B`.

The exit code is 0 if all are finished and equal, 2 if the arguments are wrong, else 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cifar_dist import cli, errors
from cifar_dist.process import run_and_exit
from cifar_dist.reports import compare


@dataclass(frozen=True)
class CompareArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, two or more, finished or not. Each is compared with the first."""


def main() -> None:
    """Print a table of the runs, and for each EQUAL, UNDECIDED or the first differences."""
    with errors.exit_on_error():
        text = "Whether runs computed the same, to the bit. Example: python -m cifar_dist.compare runs/mine runs/other"
        runs = cli.parse(CompareArguments, sys.argv[1:], "compare", description=text).runs
        compare.refuse(runs)
        print(f"{compare.table(runs)}\n")
        equal = [_compare(runs[0], other) for other in runs[1:]]
    raise SystemExit(0 if all(equal) else 1)


def _compare(first: Path, second: Path) -> bool:
    found, missing = list(compare.differences(first, second)), compare.undecided(first, second)
    verdict = "DIFFERENT" if found else f"UNDECIDED, what both have is equal; {missing}" if missing else "EQUAL"
    print(f"{first} and {second}: {verdict}")
    for line in found:
        print(f"  {line}")
    for line in compare.causes(first, second) if found else ():
        print(f"  possible cause: {line}")
    return not (found or missing)


if __name__ == "__main__":
    run_and_exit(main)
