"""Benchmarks of this machine: `python -m cifar_dist.bench PART`; `bench compare OLD NEW` compares two results."""

from __future__ import annotations

import sys

from cifar_dist import cli, errors, files
from cifar_dist.benchmarks.settings import BenchConfig, CompareConfig, validate
from cifar_dist.process import run_and_exit

_ABOUT = "Benchmarks of this machine. `compare OLD NEW` compares two files written with --json."


def main() -> None:
    """Measure what the command line names, and print tables."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["compare"]:
        _compare(cli.parse(CompareConfig, arguments[1:], "bench compare", description="What became faster or slower."))
        return
    config = cli.parse(BenchConfig, arguments, "bench", description=_ABOUT)
    with errors.exit_on_error():
        validate(config)
        # Here, not at the top: importing torch takes seconds, and --help and wrong arguments do not need it.
        from cifar_dist.benchmarks import parts, report

        figures = parts.measure(config)
        print(report.text(figures))
        if config.json is not None:
            try:
                files.write_json(config.json, figures)
            except OSError as error:
                raise errors.UserError(f"json {config.json} cannot be written: {error.strerror}.") from None
        failed = [part for part, content in figures["parts"].items() if "failure" in content]
        if failed:
            raise errors.UserError(f"{', '.join(failed)} could not be measured; see above.")


def _compare(config: CompareConfig) -> None:
    from cifar_dist.benchmarks import report

    with errors.exit_on_error():
        print(report.compare(report.read(config.old), report.read(config.new)))


if __name__ == "__main__":
    # At a plain exit on one CPU, numba's TBB would wait for ever for threads that are gone since DataLoader forked.
    run_and_exit(main)
