"""Run the parts of the benchmark: one in this process, or all of them, each in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cifar_dist.benchmarks import report
from cifar_dist.benchmarks.measure import has_gpu
from cifar_dist.benchmarks.settings import PARTS, BenchConfig, as_arguments
from cifar_dist.fault_tolerance.processes import kill_process_tree

_MODULES = {"train": "end_to_end"}  # of the others the name is that of the part
_TIME_IS_UP = "not measured: the time was up (--limit_minutes)"


def measure(config: BenchConfig) -> report.Report:
    """Measure `config.part`.

    Raises:
        DataError: the dataset is missing or damaged.
        UserError: the device does not exist, or a process that was started failed.
    """
    if config.part == "loader":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FFCV would create CUDA streams although its batches stay on the CPU
    if config.part not in ("step", "scaling"):
        from cifar_dist.data.prepare import install

        install.verify(config.data.dir, log=lambda _: None)
    return _measure_all(config) if config.part == "all" else _measure_one(config)


def _measure_one(config: BenchConfig) -> report.Report:
    if config.part != "loader":
        has_gpu(config)  # refuses a missing GPU
    started = time.perf_counter()
    module = importlib.import_module(f"cifar_dist.benchmarks.{_MODULES.get(config.part, config.part)}")
    tables = [table.to_json() for table in module.measure(config)]
    content = {"seconds": time.perf_counter() - started, "tables": tables}
    return {**report.header(), "parts": {config.part: content}}


def _measure_all(config: BenchConfig) -> report.Report:
    """Measure each part in a process of its own, so that none inherits threads, affinity or GPU memory.

    A part that fails has no tables, but its reason as "failure"; the others are measured nevertheless.
    """
    parts = {}
    deadline = time.monotonic() + 60 * config.limit_minutes
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            print(f"bench: {part} ...", file=sys.stderr, flush=True)
            out, started = Path(folder) / f"{part}.json", time.monotonic()
            command = [sys.executable, "-m", "cifar_dist.bench", *as_arguments(replace(config, part=part, json=out))]
            failure = _run(command, deadline - started)
            content = {"tables": [], "failure": failure} if failure else json.loads(out.read_text())["parts"][part]
            parts[part] = content | {"seconds": time.monotonic() - started}
    return {**report.header(), "parts": parts}


def _run(command: list[str], limit_s: float) -> str:
    """Run `command` for at most `limit_s`. Returns why it failed, empty if it did not."""
    if limit_s <= 0:
        return _TIME_IS_UP
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            messages = process.communicate(timeout=limit_s)[1]
        except subprocess.TimeoutExpired:
            return _TIME_IS_UP
        finally:
            if process.poll() is None:
                kill_process_tree(process.pid)
    return (report.last_lines(messages) or f"exit code {process.returncode}") if process.returncode else ""
