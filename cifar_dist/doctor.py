"""Check this machine: `python -m cifar_dist.doctor`.

The exit code is 0 without problems (warnings may remain), 1 with problems, 2 for wrong arguments.
"""

import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

try:
    from cifar_dist import cli, errors
    from cifar_dist.diagnosis.checks import CHECKS, Finding, Folders, Name, run
    from cifar_dist.diagnosis.software import versions
    from cifar_dist.process import run_and_exit
except ImportError as error:
    raise SystemExit(f"problem: {sys.executable} lacks what even this check needs: {error}\n  ./launch/setup") from None

_AT_A_TIME = 3  # most of them wait or import libraries on one processor


@dataclass(frozen=True)
class DataFolder:
    dir: Path = Path("data")
    """Folder of train.beton and test.beton."""


@dataclass(frozen=True)
class RunFolder:
    dir: Path = Path("runs")
    """Folder that runs are written to."""


@dataclass(frozen=True)
class DoctorArguments:
    data: DataFolder = field(default_factory=DataFolder)
    run: RunFolder = field(default_factory=RunFolder)
    only: tuple[Name, ...] = ()
    """These checks only."""
    json: Path | None = None
    """Also write the findings and all versions to this file, for bug reports; it has no keys or tokens."""


def main() -> None:
    """Print a line for each finding, and what to do below those that are not ok."""
    with errors.exit_on_error():
        text = (
            "Check whether training works on this machine. Exit code 0: no problem; 1: problems. "
            "Example: python -m cifar_dist.doctor --data.dir /scratch/data --json doctor.json"
        )
        arguments = cli.parse(DoctorArguments, sys.argv[1:], "doctor", description=text)
        write_json = cli.json_writer(arguments.json)
        findings = _check(arguments)
        counts = {status: sum(found.status == status for _, found in findings) for status in ("problem", "warning")}
        worst = next((status for status, number in counts.items() if number), "ok")
        print("; ".join(f"{number} {status}{'s' * (number != 1)}" for status, number in counts.items()))
        checks = [{"name": name, **found._asdict()} for name, found in findings]
        write_json({"status": worst, "checks": checks, "versions": versions()})
    raise SystemExit(1 if counts["problem"] else 0)


def _check(arguments: DoctorArguments) -> list[tuple[Name, Finding]]:
    """Run some checks at a time, and print their findings in the order of CHECKS."""
    names = [name for name in CHECKS if name in arguments.only or not arguments.only]
    folders, findings = Folders(arguments.data.dir, arguments.run.dir), []
    pool = ThreadPoolExecutor(_AT_A_TIME)
    try:
        for name, found in zip(names, pool.map(lambda name: run(CHECKS[name], folders), names), strict=True):
            for finding in found:
                findings.append((name, finding))
                print(f"{finding.status:<9}{name:<11}{finding.found}", flush=True)
                if finding.status != "ok" and finding.advice:
                    print(textwrap.indent(finding.advice, " " * 20), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return findings


if __name__ == "__main__":
    run_and_exit(main)
