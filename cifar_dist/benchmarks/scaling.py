"""1 to N processes on this machine, by DDP; and a simulation of many GPUs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar_dist.benchmarks import launching, simulation
from cifar_dist.benchmarks.device import compiles, micro_batches, num_local, on_gpu, stems
from cifar_dist.benchmarks.measure import Row, Table, processes
from cifar_dist.benchmarks.networks import THEIRS
from cifar_dist.benchmarks.ranks import Job
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.errors import UserError

NUM_SIMULATED = (1, 8, 64, 512)


def measure(config: BenchConfig) -> list[Table]:
    """Strong and weak scaling, the share of the exchange, and the simulation that follows from it."""
    gpu = on_gpu(config)
    available = num_local(gpu)
    sizes = [n for n in range(1, available + 1) if available % n == 0]  # as they share out the global batch
    stem, num = stems(config, gpu)[0], micro_batches(config, gpu)[0]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            device="cuda" if gpu else "cpu", precision=config.precision, stem=stem, width=config.width,
            micro_batch_size=num, sizes=sizes, repeats=config.repeats, seconds=config.seconds,
            compiled=compiles(config, gpu),            out=f"{folder}/figures.json",
        )  # fmt: skip
        _start(job)
        figures = json.loads(Path(job.out).read_text(encoding="utf-8"))
    seconds = figures["seconds"]
    title = f"V1, {stem} stem, micro-batch {num}, {'NCCL' if gpu else 'gloo'}, SGD"
    tables = [_strong(title, seconds, sizes, num, gpu)]
    if len(sizes) > 1:
        tables += [_weak(title, seconds, sizes, num), _exchange(title, seconds, sizes, figures["gradient_bytes"])]
    tables.append(_simulated(title, seconds["weak 1"], num, figures["gradient_bytes"], gpu))
    return tables


def _start(job: Job) -> None:
    command = [*launching.torchrun(job.sizes[-1], "cifar_dist.benchmarks.ranks"), json.dumps(asdict(job))]
    result = subprocess.run(
        command, env=launching.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode:
        said = launching.last_lines(result.stdout.decode(errors="replace"))
        raise UserError(f"the processes that were to be measured ended with {result.returncode}:\n{said}")


def _strong(title: str, seconds: dict[str, list[float]], sizes: list[int], num: int, gpu: bool) -> Table:
    images = num * sizes[-1]
    rows = []
    for size in sizes:
        threads = "" if gpu else f" of {len(os.sched_getaffinity(0)) // size} threads"
        rows.append(Row(processes(size) + threads, [images / s for s in seconds[f"strong {size}"]]))
    return Table(f"strong: {title}, global batch {images} by accumulation", "images/s", rows, rows[0].name)


def _weak(title: str, seconds: dict[str, list[float]], sizes: list[int], num: int) -> Table:
    rows = []
    for size in sizes:
        times = seconds.get(f"weak {size}") or seconds[f"strong {size}"]
        rows.append(Row(processes(size), [num * size / s for s in times]))
    notes = ["on CPUs a single process has all processors, so that more processes share what it had"]
    if theirs := seconds.get(f"theirs {sizes[-1]}"):
        rows.append(Row(f"{processes(sizes[-1])}, {THEIRS}", [num * sizes[-1] / s for s in theirs]))
    return Table(f"weak: {title} per process", "images/s", rows, rows[0].name, notes=notes)


def _exchange(title: str, seconds: dict[str, list[float]], sizes: list[int], gradient_bytes: int) -> Table:
    rows = []
    for size in sizes[1:]:
        loud = seconds.get(f"weak {size}") or seconds[f"strong {size}"]
        silent, alone = seconds[f"silent {size}"], seconds[f"exchange {size}"]
        shown = 100 * (1 - statistics.median(silent) / statistics.median(loud))
        more: dict[str, Any] = {"% of step, not hidden": shown, "GB/s": gradient_bytes / statistics.median(alone) / 1e9}
        rows.append(Row(f"{processes(size)}, {gradient_bytes / 1e6:.1f} MB", [1e3 * s for s in alone], more=more))
    return Table(f"exchange of gradients: {title}", "ms", rows, lower_is_better=True)


def _simulated(title: str, seconds: list[float], num: int, gradient_bytes: int, gpu: bool) -> Table:
    network, compute = simulation.Network(), statistics.median(seconds)
    rows = []
    for n in NUM_SIMULATED:
        step = simulation.step_seconds(compute, gradient_bytes, n, network)
        more = {"% efficiency": 100 * compute / step, "ms/step": 1e3 * step}
        rows.append(Row(processes(n), [num * n / step], more=more))
    measured = "" if gpu else ", measured on a CPU, on which the efficiency of GPUs cannot be read off"
    notes = [
        f"SIMULATION, nothing but the step of one device ({1e3 * compute:.1f} ms{measured}) was measured",
        network.describe(),
    ]
    return Table(f"simulated, weak: {title}", "images/s", rows, rows[0].name, notes=notes)
