"""What the scripts in slurm/ run on the first node of a job: `python -m cifar_dist.cluster.slurm train|sweep|evaluate`.

Starts a launcher on each node under srun, and requeues the job after the signal that Slurm sends before the time limit.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.cli import validate_for_table
from cifar_dist.cluster import slurm_job
from cifar_dist.errors import DivergedError, PeerError, StopError, UserError, exit_on_error

if TYPE_CHECKING:
    from cifar_dist.config import Config

REPOSITORY = Path(__file__).parents[2]
# NODE_RANK=$SLURM_NODEID, except with MAX_RESTARTS, where the rendezvous assigns ranks.
_ON_NODE = ("bash", "-c", '[[ ${MAX_RESTARTS:-0} != 0 ]] || export NODE_RANK=$SLURM_NODEID; exec "$@"', "node")


def main() -> None:
    """Run the work that the first argument names, and exit with its code (see `errors`)."""
    steps = slurm_job.Steps()  # handles signals from now on; slow imports come later
    with exit_on_error():
        work, *arguments = sys.argv[1:] or [""]
        kinds = {"train": _train, "sweep": _sweep, "evaluate": _evaluate}
        if work not in kinds:
            raise UserError(f"the first argument is '{work}'; valid: {', '.join(kinds)}.")
        code = kinds[work](slurm_job.Job.current(), steps, arguments)
    raise SystemExit(code)


def _train(job: slurm_job.Job, steps: slurm_job.Steps, arguments: Sequence[str]) -> int:
    config = _config(job, arguments)
    directory = config.run.dir or Path("runs") / (config.run.name or job.label)
    named = () if config.run.dir else ("--run.dir", str(directory))
    return _run(job, steps, arguments, config, directory, [_script(), *arguments, *named])


def _config(job: slurm_job.Job, arguments: Sequence[str]) -> Config:
    """The configuration of `arguments`. Parsed here so that mistakes are printed once, and not on every node."""
    from cifar_dist import cli

    os.environ["WORLD_SIZE"] = str(job.num_nodes * slurm_job.processes_per_node())
    try:
        return cli.load_config(arguments, "train")
    finally:
        del os.environ["WORLD_SIZE"]


def _run(
    job: slurm_job.Job,
    steps: slurm_job.Steps,
    arguments: Sequence[str],
    config: Config,
    directory: Path,
    again: Sequence[str],
) -> int:
    """Train in `directory`, resuming what is there, and requeue the job after SIGUSR1.

    Args:
        again: arguments of sbatch that resume the run later.
    """
    resume = ("--run.dir", str(directory), "--run.resume", "auto")
    # A checkpoint given by path is where the run starts; after a requeue it resumes from its own.
    settings = [*arguments, *(resume if job.restarts or config.run.resume == "never" else resume[:2])]
    if config.data.stage_dir is None:
        settings += ["--data.stage_dir", os.environ.get("SLURM_TMPDIR", f"/tmp/cifar_dist-{os.getuid()}")]
    num_processes = slurm_job.processes_per_node()
    print(f"job {job.id}: {job.num_nodes} x {num_processes} processes; run directory {directory}", flush=True)
    env = {
        "NNODES": str(job.num_nodes),
        "NPROC_PER_NODE": str(num_processes),
        "RUN_ID": f"{job.id}-{job.restarts}",
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or slurm_job.first_address(),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(slurm_job.free_port(job.id)),
    }
    code = steps.run(job, [*_ON_NODE, str(REPOSITORY / "launch/multinode"), *settings], os.environ | env)
    final_code, step = slurm_job.final_status(directory, job)
    code = code if final_code is None else final_code
    if code == StopError.exit_code and steps.stop_signal == signal.SIGUSR1:
        print(f"job {job.id}: stopped; requeueing it (requeued {job.restarts} times so far)", flush=True)
        why_not = slurm_job.requeue(job, directory, step)
        if not why_not:
            return code
        print(f"job {job.id}: not requeued: {why_not}.", flush=True)
    if code in (1, PeerError.exit_code, DivergedError.exit_code, StopError.exit_code):
        print(
            f"job {job.id}: ended with exit code {code}. To resume from the newest checkpoint, with the other options "
            f"of sbatch as before:\n  sbatch {shlex.join(again)}",
            flush=True,
        )
    return code


def _script() -> str:
    """The batch script."""
    return os.environ.get("CIFAR_DIST_SCRIPT", "slurm/train.sh")


def _sweep(job: slurm_job.Job, steps: slurm_job.Steps, arguments: Sequence[str]) -> int:
    """Run I of a job array: seed I; with a grid of G lines, line I mod G with seed I div G."""
    if job.array_index is None or job.array_size is None:
        raise UserError("a sweep is a job array: sbatch --array=0-2 slurm/sweep.sh --config configs/quickstart.yaml.")
    grid, own = _grid(arguments)
    seed, line = divmod(job.array_index, len(grid))
    asked = [*own, *shlex.split(grid[line]), "--run.seed", str(seed)]
    config = _config(job, asked)
    validate_for_table(config)
    folder = config.run.dir or Path("runs") / (config.run.name or f"sweep-{job.array_id}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run. Choose another --run.name.")
    inside = Path(f"seed-{seed}") if len(grid) == 1 else Path(f"setting-{line}", f"seed-{seed}")
    named = () if config.run.dir else ("--run.dir", str(folder))
    again = [f"--array={job.array_index}", _script(), *arguments, *named]
    code = _run(job, steps, asked, config, folder / inside, again)
    if code == 0:
        _report(folder, grid, job.array_size)
    return code


def _grid(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The lines of the --grid file (without it one empty line), and the other arguments."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--grid", type=Path)
    known, rest = parser.parse_known_args(arguments)
    if known.grid is None:
        return [""], rest
    try:
        lines = [line.strip() for line in known.grid.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--grid {known.grid} cannot be read: {error}.") from None
    settings = [line for line in lines if line and not line.startswith("#")]
    if not settings:
        raise UserError(f"--grid {known.grid} holds no settings. Write one line per setting, e.g. --optim.lr 0.1.")
    return settings, rest


def _report(folder: Path, grid: Sequence[str], num_runs: int) -> None:
    """In the last job of the sweep to end: print the table of all runs and write its figures."""
    from filelock import FileLock

    from cifar_dist.reports import finished_runs, seeds

    groups = [folder] if len(grid) == 1 else [folder / f"setting-{line}" for line in range(len(grid))]
    output = folder / "seeds.json"
    with FileLock(folder / ".table.lock"):  # two jobs may end at the same time
        directories = [run for group in groups if group.is_dir() for run in finished_runs.run_directories([group])]
        complete = [run for run in directories if (run / "summary.json").exists()]
        total = max(num_runs, len(directories))
        if len(complete) < total:
            print(f"sweep {folder}: {len(complete)} of {total} runs are complete", flush=True)
        elif _has_all(output, complete):
            print(f"sweep {folder}: all {total} runs are complete; see {output}", flush=True)
        else:
            print(seeds.compare(dict(zip(grid, groups, strict=True)), output), flush=True)


def _has_all(table: Path, runs: Sequence[Path]) -> bool:
    """Whether `table` has the figures of all `runs`, by their model_sha256."""
    if not table.exists():
        return False
    text = table.read_text(encoding="utf-8")
    return all(json.loads((run / "summary.json").read_text(encoding="utf-8"))["model_sha256"] in text for run in runs)


def _evaluate(job: slurm_job.Job, steps: slurm_job.Steps, arguments: Sequence[str]) -> int:
    """Score a checkpoint on the first node of the job."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(slurm_job.processes_per_node()), "-m", "cifar_dist.evaluate"]
    return steps.run(job, [*command, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}, num_nodes=1)


if __name__ == "__main__":
    main()
