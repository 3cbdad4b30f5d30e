"""A sweep on this machine: settings times seeds, one run after another, and one table at the end.

Repeated after an interruption it keeps finished runs and resumes the interrupted one.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_dist import cli, environment
from cifar_dist.cluster import grid
from cifar_dist.cluster.slurm_job import processes_per_node
from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import NonFiniteError, StopError, UserError, explain_os_error
from cifar_dist.files import escape_path, write_text_atomic
from cifar_dist.process import handled_signals
from cifar_dist.reports import finished_runs, seeds


class Job:
    """The run that is trained now.

    It has a process group of its own, so that a stop signal reaches it once, from this process.
    """

    def __init__(self, label: str) -> None:
        """From now on the first stop signal ends the run, which saves, and then this process."""
        self._label = label
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_signals = list[int]()
        for number in handled_signals():
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: object) -> None:
        self._stop_signals.append(number)
        if self._process is not None and len(self._stop_signals) == 1:
            self._process.terminate()

    def run(self, settings: Sequence[str], num_processes: int) -> int:
        """Train as launch/node does, and return the exit code.

        Raises:
            SystemExit: after a stop signal; the run has saved.
        """
        restarts = environment.number("MAX_RESTARTS", 0)
        command = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nnodes", "1"]
        command += ["--nproc-per-node", str(num_processes), "--max-restarts", str(restarts)]
        command += ["--numa-binding", binding] if (binding := os.environ.get("NUMA_BINDING")) else []
        command += ["-m", "cifar_dist.train", *settings]
        code = 0
        if not self._stop_signals:
            environ = {name: value for name, value in os.environ.items() if name != "WANDB_RUN_ID"}  # names one run
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, env=environ)
            if self._stop_signals:  # received while it was started
                self._process.terminate()
            code = self._process.wait()
            self._process = None
        if self._stop_signals:
            number = self._stop_signals[0]
            print(f"{self._label}: stopped; the same command resumes from here", file=sys.stderr)
            raise SystemExit(StopError.exit_code if number == signal.SIGUSR1 else 128 + number)
        return code if code >= 0 else 128 - code


def run_sweep(config: Config, name: str, lines: Sequence[str], which: range) -> None:
    """Train each line of settings over `config` with each seed, then print their table and write seeds.json.

    Args:
        name: begins the name of each run; the folder of the runs is `config.run.dir`, or runs/NAME.
        lines: see `grid.settings`.
        which: the seeds.

    Raises:
        UserError: settings are wrong, or a run with other settings is there.
        SystemExit: after a stop signal, or with the exit code of a run that failed.
        NonFiniteError: runs diverged; the others are complete.
    """
    label = "seeds" if len(lines) == 1 else "sweep"
    job = Job(label)
    folder, num_processes = config.run.dir or Path("runs", name), processes_per_node()
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run. Choose another --run.name.")
    groups = grid.folders(folder, lines)
    directories = [[group / f"seed-{seed}" for seed in which] for group in groups]
    asked = [cli.parse(Config, shlex.split(line), "sweep", config) for line in lines]
    for settings, own in zip(asked, directories, strict=True):  # now, instead of after hours of training
        cli.validate(settings)
        cli.accumulation_steps(settings.train.batch_size, settings.train.micro_batch_size, num_processes)
        finished_runs.refuse_other_settings(own, settings)
    files = [_write_settings(group, settings) for group, settings in zip(groups, asked, strict=True)]

    diverged = list[str]()
    order = [(seed, k) for seed in which for k in range(len(lines))]
    for number, (seed, k) in enumerate(order, 1):
        directory = groups[k] / f"seed-{seed}"
        what = ", ".join(filter(None, (f"seed {seed}", lines[k])))
        if (directory / "summary.json").exists():
            print(f"{label}: {what} is complete, in {directory}", flush=True)
            continue
        print(f"{label}: run {number} of {len(order)}, {what}, in {directory}", flush=True)
        run_name = "-".join([name, *([groups[k].name] if len(lines) > 1 else []), f"seed-{seed}"])
        words = ["--config", escape_path(str(files[k].absolute())), "--run.dir", escape_path(str(directory))]
        words += ["--run.name", run_name, "--run.seed", str(seed), "--run.resume", "auto"]
        words += grid.tracking(asked[k].track, name, groups[k].name if len(lines) > 1 else "")
        code = job.run(words, num_processes)
        if code == NonFiniteError.exit_code:  # when repeated, it would diverge again
            diverged.append(str(directory))
        elif code:
            print(
                f"error: the run in {directory} ended with exit code {code}. Repeat the command to resume it.",
                file=sys.stderr,
            )
            raise SystemExit(code)
    if diverged:
        raise NonFiniteError(
            f"{len(diverged)} of the {len(order)} runs diverged, so there is no table; the others are complete. Leave "
            f"their settings out, under another --run.name.\n" + "\n".join(diverged)
        )
    print(f"\n{seeds.compare(dict(zip(lines, directories, strict=True)), folder / 'seeds.json')}")


def _write_settings(folder: Path, config: Config) -> Path:
    """The file that the runs in `folder` get with --config, so that a change of the original reaches none of them."""
    path = folder / "settings.yaml"
    with explain_os_error(f"{path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, to_yaml(config))
    return path
