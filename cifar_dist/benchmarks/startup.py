"""From `torchrun` to the first optimizer step, and where the time goes."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

from cifar_dist.benchmarks import launching
from cifar_dist.benchmarks.device import micro_batches, num_local, on_gpu, stems
from cifar_dist.benchmarks.measure import Row, Table, processes
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.errors import UserError
from cifar_dist.processes import kill_family
from cifar_dist.training.trainer import STARTUP

_LIMIT_S = 300
_COMPILERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR")


def measure(config: BenchConfig) -> list[Table]:
    """One process and as many as there are devices (processors, up to 8); first with cold caches, then warm."""
    gpu = on_gpu(config)
    tables = []
    for size in dict.fromkeys((1, num_local(gpu))):
        with tempfile.TemporaryDirectory() as folder:
            runs = Path(folder)
            caches = {name: str(runs / name) for name in _COMPILERS}
            no_bytecode = {"PYTHONPYCACHEPREFIX": str(runs / "bytecode")}
            cold, split = _start(config, size, gpu, runs / "cold", caches | no_bytecode)
            warm = [_start(config, size, gpu, runs / f"warm-{k}", caches) for k in range(min(2, config.repeats))]
        rows = [
            Row("cold: no bytecode, empty caches of compilers", [cold], more=split),
            Row("warm", [total for total, _ in warm], more=min(warm, key=lambda start: start[0])[1]),
        ]
        title = f"from torchrun to the first step, {processes(size)}"
        tables.append(Table(title, "s", rows, lower_is_better=True, notes=["columns: seconds of the first rank"]))
    return tables


def _start(
    config: BenchConfig, size: int, gpu: bool, directory: Path, environment: dict[str, str]
) -> tuple[float, dict[str, float]]:
    """Seconds until the log has the first step, and what it says of them.

    Args:
        environment: where caches are, beside what this process has.
    """
    everything = launching.environment() | {"WANDB_MODE": "offline"} | environment
    log, said = directory / "logs" / "rank-0.log", directory.with_name(f"{directory.name}.out")
    started = time.perf_counter()
    with (
        said.open("wb") as output,
        subprocess.Popen(
            _command(config, size, gpu, directory), env=everything, stdout=output, stderr=output
        ) as process,
    ):
        try:
            while (split := _split(log)) is None:
                if process.poll() is not None or time.perf_counter() - started > _LIMIT_S:
                    told = launching.last_lines(said.read_text(encoding="utf-8", errors="replace"))
                    raise UserError(f"the run that was to be measured came to no first step:\n{told}")
                time.sleep(0.02)
            total = time.perf_counter() - started
        finally:
            # What comes after the first step, such as scoring, is not wanted.
            if process.poll() is None:
                kill_family(process.pid)
    return total, {"torchrun": total - sum(split.values()), **split}


def _command(config: BenchConfig, size: int, gpu: bool, directory: Path) -> list[str]:
    num = micro_batches(config, gpu)[0]
    return [
        *launching.torchrun(size, "cifar_dist.train"), "--run.dir", str(directory),
        "--data.dir", str(config.data.dir.resolve()), "--model.stem", stems(config, gpu)[0],
        "--model.width", str(config.width), "--train.device", config.device, "--train.max_steps", "1",
        "--train.micro_batch_size", str(num), "--train.batch_size", str(num * size), "--train.log_every_steps", "1",
        "--train.checkpoint_every_steps", "0", "--train.precision", config.precision,
        "--train.compile", config.compile, "--eval.bn_samples", "500", "--eval.tta", "none",
    ]  # fmt: skip


def _split(log: Path) -> dict[str, float] | None:
    """What the first rank wrote after its first step, or None so far."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    found = [line for line in lines if STARTUP in line and line.endswith("\n")]
    split: dict[str, float] | None = json.loads(found[0].partition(STARTUP)[2]) if found else None
    return split
