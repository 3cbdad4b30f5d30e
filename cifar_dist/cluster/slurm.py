"""The batch scripts in slurm/ run it on the first node: `python -m cifar_dist.cluster.slurm train|sweep|evaluate`.

Starts a launcher on each node under srun, and requeues the job after the signal that Slurm sends before the time limit.
Does not import torch, so that it starts at once.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_dist import cli
from cifar_dist.cluster import grid
from cifar_dist.cluster.slurm_job import Job, first_address, free_port, processes_per_node
from cifar_dist.config import Config
from cifar_dist.environment import optional_number
from cifar_dist.errors import DivergedError, PeerError, StopError, UserError, exit_on_error
from cifar_dist.files import escape_path
from cifar_dist.filesystem import lock
from cifar_dist.process import run_and_exit
from cifar_dist.reports import seeds

USAGE = """\
usage: python -m cifar_dist.cluster.slurm train|sweep|evaluate [SETTINGS]

The scripts in slurm/ run it inside a job of Slurm. `bash slurm/train.sh --help`, and the same with sweep.sh and
evaluate.sh, prints how to submit each. SETTINGS are those of cifar_dist.train or cifar_dist.evaluate, see their --help.
"""


def main() -> None:
    """Run the work that the first argument names, and exit with its code (see `errors`)."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(USAGE, end="")
        return
    with exit_on_error():
        job = Job()
        job.handle_signals()
        kinds = {"train": _train, "sweep": _sweep, "evaluate": _evaluate}
        work, *arguments = sys.argv[1:] or [""]
        if work not in kinds:
            raise UserError(f"the first argument is '{work}'; valid: {', '.join(kinds)}.")
        code = kinds[work](job, arguments)
    raise SystemExit(code)


def _train(job: Job, arguments: Sequence[str]) -> int:
    config = _config(job, arguments)
    directory = config.run.dir or Path("runs", config.run.name or f"job-{job.id}")
    named = () if config.run.dir else ("--run.dir", escape_path(str(directory)))
    return _run(job, arguments, config, directory, ["slurm/train.sh", *arguments, *named])


def _config(job: Job, arguments: Sequence[str]) -> Config:
    """The configuration of `arguments`. Parsed here so that mistakes are printed once, and not on every node."""
    os.environ["WORLD_SIZE"] = str(job.num_nodes * processes_per_node())
    config = cli.load_config(arguments)
    del os.environ["WORLD_SIZE"]
    return config


def _run(job: Job, arguments: Sequence[str], config: Config, directory: Path, again: Sequence[str]) -> int:
    """Train in `directory`, resuming what is there, and requeue the job after SIGUSR1.

    Args:
        again: the batch script and its arguments, for the message that tells how to resume.
    """
    settings = [*arguments, "--run.dir", escape_path(str(directory))]
    # After a requeue a run resumes, from whatever it began, and replaces none; unless it had not begun.
    copied = isinstance(config.run.resume, Path) and any(directory.glob("checkpoints/step-*.pt"))
    if config.run.resume == "never" or (job.restarts and (copied or job.has_run_in(directory))):
        settings += ["--run.resume", "auto"]
    if config.data.stage_dir is None:
        stage_dir = os.environ.get("SLURM_TMPDIR") or f"/tmp/cifar_dist-{os.getuid()}"
        settings += ["--data.stage_dir", escape_path(stage_dir)]
    num_processes = processes_per_node()
    print(f"job {job.id}: {job.num_nodes} x {num_processes} processes; run directory {directory}", flush=True)
    env = {
        "NNODES": str(job.num_nodes),
        "NODE_RANK": "slurm",  # launch/multinode replaces it by SLURM_NODEID
        "NPROC_PER_NODE": str(num_processes),
        "RUN_ID": f"{job.id}-{job.restarts}",
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_address(),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(free_port(job.id)),
    }
    repository = os.environ.get("CIFAR_DIST_HOME") or Path(__file__).parents[2]  # set by slurm/*.sh
    code = job.run([str(Path(repository, "launch/multinode")), *settings], os.environ | env)
    status = job.final_status(directory)
    if status.get("exit_code") is not None:
        code = status["exit_code"]  # more informative than srun's, which is the greatest of all nodes
    if code == StopError.exit_code and job.stop_signals[:1] == [signal.SIGUSR1]:
        print(f"job {job.id}: stopped; requeueing it (requeued {job.restarts} times so far)", flush=True)
        why_not = job.requeue(directory, status.get("last_checkpoint_step"))
        if not why_not:
            return code
        print(f"job {job.id}: not requeued: {why_not}.", flush=True)
    if code in (1, PeerError.exit_code, DivergedError.exit_code, StopError.exit_code):
        again = [*again, *(["--run.resume", "auto"] if config.run.resume == "replace" else [])]
        print(
            f"job {job.id}: ended with exit code {code}. To resume from the newest checkpoint, with the other options "
            f"of sbatch as before:\n  sbatch {shlex.join(again)}",
            flush=True,
        )
    return code


def _sweep(job: Job, arguments: Sequence[str]) -> int:
    """Run I of a job array: seed I; with a grid of G lines, line I mod G with seed I div G."""
    array, index, size = (optional_number(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID", "TASK_COUNT"))
    if array is None or index is None or size is None:
        raise UserError("a sweep is a job array: sbatch --array=0-2 slurm/sweep.sh --config configs/quickstart.yaml.")
    os.environ.pop("WANDB_RUN_ID", None)  # names one run
    lines, own = _grid(arguments)
    seed, line = divmod(index, len(lines))
    asked = [*own, *shlex.split(lines[line]), "--run.seed", str(seed)]
    config = _config(job, asked)
    cli.validate_for_table(config)
    folder = config.run.dir or Path("runs", config.run.name or f"sweep-{array}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run. Choose another --run.name.")
    groups = grid.folders(folder, lines)
    asked += grid.tracking(config.track, folder.name, groups[line].name if len(lines) > 1 else "")
    named = () if config.run.dir else ("--run.dir", escape_path(str(folder)))
    again = [f"--array={index}", "slurm/sweep.sh", *arguments, *named]
    code = _run(job, asked, config, groups[line] / f"seed-{seed}", again)
    if code == 0:
        _report(folder, dict(zip(lines, groups, strict=True)), size)
    return code


def _grid(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The lines of --grid (see `grid.settings`), and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--grid", nargs="+", default=[], action="extend")
    known, rest = parser.parse_known_args(arguments)
    return grid.settings(known.grid), rest


def _report(folder: Path, groups: Mapping[str, Path], num_runs: int) -> None:
    """In the last job of the sweep to end: print the table of all runs and write its figures (see `seeds.compare`)."""
    output = folder / "seeds.json"
    with lock(folder / ".table.lock"):  # two jobs may end at the same time
        begun = [path for group in groups.values() for path in group.glob("*/config.yaml")]
        written = [path.stat().st_mtime_ns for group in groups.values() for path in group.glob("*/summary.json")]
        total = max(num_runs, len(begun))
        if len(written) < total:
            print(f"sweep {folder}: {len(written)} of {total} runs are complete", flush=True)
        elif output.exists() and output.stat().st_mtime_ns >= max(written):
            print(f"sweep {folder}: all {total} runs are complete; see {output}", flush=True)
        else:
            print(seeds.compare({line: [group] for line, group in groups.items()}, output), flush=True)


def _evaluate(job: Job, arguments: Sequence[str]) -> int:
    """Score a checkpoint on the first node of the job."""
    python = os.environ.get("CIFAR_DIST_PYTHON") or sys.executable
    launcher = [python, "-m", "cifar_dist.cluster.launcher", "--standalone"]  # keeps the exit code
    command = [*launcher, "--nproc-per-node", str(processes_per_node()), "-m", "cifar_dist.evaluate"]
    return job.run([*command, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}, num_nodes=1)


if __name__ == "__main__":
    run_and_exit(main, needs_output=False)
