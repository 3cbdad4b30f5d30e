"""Benchmarks of this machine: `python -m cifar_dist.bench PART`; `bench compare OLD NEW` compares two results.

Functions import torch, which takes seconds, only after --help and wrong arguments are dealt with.
"""

import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from cifar_dist import cli, errors
from cifar_dist.benchmarks.settings import PARTS, BenchConfig, CompareConfig
from cifar_dist.errors import UserError
from cifar_dist.process import kill_process_tree, run_and_exit

_TIME_IS_UP = "not measured: the time was up (--limit_minutes)"


def main() -> None:
    """Measure what the command line names, or compare two results, and print tables."""
    arguments = sys.argv[1:]
    text = (
        "Benchmarks of this machine. `compare OLD NEW` compares two files written with --json. "
        "Example: python -m cifar_dist.bench step --json bench.json"
    )
    with errors.exit_on_error():
        if arguments[:1] != ["compare"]:
            _measure(cli.parse(BenchConfig, arguments, "bench", description=text))
            return
        results = cli.parse(CompareConfig, arguments[1:], "bench compare", description="What became faster or slower.")
        from cifar_dist.benchmarks import report

        print(report.compare(report.read(results.old), report.read(results.new)))


def _measure(config: BenchConfig) -> None:
    cli.validate_ranges(config)
    write_json = cli.json_writer(config.json)
    if config.part in ("loader", "train", "all"):
        from cifar_dist.data.prepare import install

        install.verify(config.data_dir, log=lambda _: None)
    parts = _all_parts(config) if config.part == "all" else {config.part: _one_part(config)}
    from cifar_dist.benchmarks import report

    figures = {**report.header(), "parts": parts}
    print(report.text(figures))
    write_json(figures)
    failures = {part: content["failure"] for part, content in parts.items() if "failure" in content}
    if len(failures) == len(parts) or any(reason != _TIME_IS_UP for reason in failures.values()):
        raise UserError(f"{', '.join(failures)} could not be measured; see above.")


def _one_part(config: BenchConfig) -> dict[str, Any]:
    if config.part == "loader":
        config = replace(config, device="cpu")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FFCV would create CUDA streams although its batches stay on the CPU
    import torch

    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise UserError("device is cuda, but torch finds no GPU here. Check nvidia-smi, or use --device cpu.")
    started = time.perf_counter()
    module = importlib.import_module(f"cifar_dist.benchmarks.{config.part}")
    tables = module.measure(config.resolve(has_gpu and config.device != "cpu"))
    return {"seconds": time.perf_counter() - started, "tables": [table.to_json() for table in tables]}


def _all_parts(config: BenchConfig) -> dict[str, dict[str, Any]]:
    """Measure each part in a process of its own, so that none inherits threads, affinity or GPU memory.

    A part that fails has no tables, but its reason as "failure"; the others are measured nevertheless.
    """
    parts, spawn = dict[str, dict[str, Any]](), multiprocessing.get_context("spawn")
    deadline = time.monotonic() + 60 * config.limit_minutes
    for part in PARTS:
        print(f"bench: {part} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        # stdout goes to stderr: it is for the tables, and gloo prints to it.
        with ProcessPoolExecutor(1, spawn, initializer=os.dup2, initargs=(2, 1)) as pool:
            measurement = pool.submit(_one_part, replace(config, part=part))
            try:
                content = measurement.result(max(0.0, deadline - started))
            except Exception as error:  # noqa: BLE001 - whatever a part raises, or its process ended
                reason = f"{type(error).__name__}: {error}"
                if isinstance(error, TimeoutError) and not measurement.done():
                    reason = _TIME_IS_UP
                content = {"tables": [], "failure": reason}
            finally:
                for process in multiprocessing.active_children():
                    kill_process_tree(process.pid)  # type: ignore[arg-type]  # not None, as it was started
        parts[part] = content | {"seconds": time.monotonic() - started}
    return parts


if __name__ == "__main__":
    # At a plain exit on one CPU, numba's TBB would wait for ever for threads that are gone since DataLoader forked.
    run_and_exit(main)
