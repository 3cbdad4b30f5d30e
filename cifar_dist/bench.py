"""Measure, on this machine: `python -m cifar_dist.bench PART`, or hold two reports against each other: `compare`."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar_dist import cli, errors, files
from cifar_dist.benchmarks.launching import last_lines
from cifar_dist.benchmarks.settings import PARTS, BenchConfig, CompareConfig, as_arguments, validate
from cifar_dist.processes import kill_family, run_and_exit

_ABOUT = "Measure this machine; `compare OLD NEW` holds two files of --json against each other."


def main() -> None:
    """Measure what the command line names, and print tables."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["compare"]:
        chosen = cli.parse(CompareConfig, arguments[1:], "bench compare", description="What became faster or slower.")
        with errors.reported():
            from cifar_dist.benchmarks import report

            print(report.compare(report.read(chosen.old), report.read(chosen.new)))
        return
    config = cli.parse(BenchConfig, arguments, "bench", description=_ABOUT)
    with errors.reported():
        validate(config)
        _check_data(config)
        report_of = _all(config) if config.part == "all" else _one(config, config.part)
        from cifar_dist.benchmarks import report

        print(report.text(report_of))
        if config.json is not None:
            try:
                files.write_text_atomic(config.json, json.dumps(report_of, indent=1) + "\n")
            except OSError as error:
                raise errors.UserError(f"json {config.json} cannot be written: {error.strerror}.") from None
        failed = [part for part, content in report_of["parts"].items() if "failure" in content]
        if failed:
            raise errors.UserError(f"{', '.join(failed)} could not be measured; see above.")


def _check_data(config: BenchConfig) -> None:
    """Before anything is measured, and so that no measurement prepares the dataset."""
    if config.part in ("augment", "step", "scaling"):
        return
    from cifar_dist.data import dataset

    missing = [name for name in (dataset.TRAIN, dataset.MANIFEST) if not (config.data.dir / name).is_file()]
    if missing:
        advice = f"python -m cifar_dist.prepare --data.dir {shlex.quote(str(config.data.dir))}"
        raise errors.DataError(f"{config.data.dir / missing[0]} is not there. Prepare the dataset: {advice}")


def _one(config: BenchConfig, part: str) -> dict[str, Any]:
    if part == "loader":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FFCV would make streams on a GPU for batches that stay here
    from cifar_dist.benchmarks import device, report

    if part != "loader":
        device.on_gpu(config)
    started = time.perf_counter()
    tables = importlib.import_module(f"cifar_dist.benchmarks.{part}").measure(config)
    content = {"seconds": time.perf_counter() - started, "tables": [table.plain() for table in tables]}
    return {**report.header(), "parts": {part: content}}


def _all(config: BenchConfig) -> dict[str, Any]:
    """Each part in a process of its own, which leaves neither threads nor bindings to the next; one that fails does
    not keep the others from being measured."""
    from cifar_dist.benchmarks import report

    parts = dict[str, Any]()
    deadline = time.monotonic() + 60 * config.limit_minutes
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            print(f"bench: {part} ...", file=sys.stderr, flush=True)
            out, started = Path(folder) / f"{part}.json", time.monotonic()
            command = [sys.executable, "-m", "cifar_dist.bench", *as_arguments(replace(config, part=part, json=out))]
            failure = _run(command, deadline - started)
            found = {"tables": [], "failure": failure} if failure else json.loads(out.read_text())["parts"][part]
            parts[part] = found | {"seconds": time.monotonic() - started}
    return {**report.header(), "parts": parts}


def _run(command: list[str], limit_s: float) -> str:
    """Run a part for at most so long; returns what went wrong, or nothing."""
    if limit_s <= 0:
        return "not measured: the time was up (--limit_minutes)"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=limit_s)[1]
        except subprocess.TimeoutExpired:
            return "not measured: the time was up (--limit_minutes)"
        finally:
            if process.poll() is None:
                kill_family(process.pid)
    return (last_lines(said) or f"exit code {process.returncode}") if process.returncode else ""


if __name__ == "__main__":
    run_and_exit(main)
