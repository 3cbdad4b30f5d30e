"""A Slurm job as its batch script sees it on the first node: its resources, its job steps, its requeue.

Tested with Slurm 22.05.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cifar_dist.cluster.rendezvous import is_port_in_use
from cifar_dist.environment import num_processors, optional_number
from cifar_dist.errors import PeerError, StopError, UserError, explain_os_error
from cifar_dist.files import read_json, write_json
from cifar_dist.process import handled_signals

# Below the kernel's ephemeral ports.
_FIRST_PORT, _NUM_PORTS = 16_384, 16_384
# How soon srun is sent a stop signal, and how often, since it may lose one while it starts the tasks.
_REPEAT_S = 2.0
# How long other nodes may run after the first has exited. Living nodes notice a lost peer within seconds; Slurm notices
# a lost node after SlurmdTimeout (default 300 s), and requeues the job only if it is still running then.
_LAST_NODE_S = 600
_ATTEMPTS = "attempts.json"
_MAX_IDLE = 3  # consecutive attempts without a further step


class Job:
    """The job of this process.

    Slurm's SIGTERM, at the time limit or by scancel, reaches every process of a step and the script. A signal for the
    script alone (`--signal=B:USR1@120`) does not reach the step. It is forwarded as SIGUSR1, which srun passes on;
    SIGTERM would make srun kill the step.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        """Read the environment of the batch script.

        Raises:
            UserError: this is not a batch job, or a variable is wrong.
        """
        job = optional_number("SLURM_JOB_ID", env)
        if job is None:
            raise UserError("this script is for Slurm: sbatch slurm/train.sh. Without Slurm, use launch/node.")
        most = env.get("MAX_REQUEUES") or "20"
        if not re.fullmatch("[0-9]{1,4}", most):
            raise UserError(f"MAX_REQUEUES is {most}; valid: 0 to 9999.")
        self.id, self.max_requeues = job, int(most)
        self.restarts = optional_number("SLURM_RESTART_COUNT", env) or 0
        self.num_nodes = optional_number("SLURM_JOB_NUM_NODES", env) or 1
        self.stop_signals: list[int] = []  # received, in their order

    def handle_signals(self) -> None:
        """From now on stop signals are added to `stop_signals`, and `run` forwards them."""
        for number in handled_signals():
            signal.signal(number, lambda received, _: self.stop_signals.append(received))

    def run(self, command: Sequence[str], env: Mapping[str, str], num_nodes: int | None = None) -> int:
        """Run `command` once per node, on the first `num_nodes` if given; return the greatest exit code of all nodes.

        Each task may use all resources of the job on its node. srun does not kill the others when one exits.

        Raises:
            UserError: srun is missing.
        """
        if self.stop_signals:
            return StopError.exit_code
        nodes = str(num_nodes or self.num_nodes)
        options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--cpu-bind=none"]
        options += ["--kill-on-bad-exit=0", f"--wait={_LAST_NODE_S}", "--export=ALL"]  # also after sbatch --export=NONE
        if os.environ.get("SLURM_GPUS_ON_NODE"):  # a step of an exclusive job gets no GPUs unless it requests them
            options.append(f"--gpus-per-node={gpus_per_node()}")
        advice = "Put Slurm's programs into PATH before sbatch, in a container too; see docs/slurm.md, section Sites."
        with explain_os_error(f"srun cannot be started on {socket.gethostname()}", advice):
            step = subprocess.Popen(["srun", *options, *command], env=env)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = step.wait(_REPEAT_S)
                return code if code >= 0 else PeerError.exit_code
            if self.stop_signals:
                step.send_signal(signal.SIGUSR1)

    def final_status(self, directory: Path) -> dict[str, Any]:
        """What status.json says of the run in `directory`; empty if another job or attempt wrote it."""
        status = read_json(directory / "status.json")
        return status if (status.get("job"), status.get("restarts")) == (str(self.id), self.restarts) else {}

    def has_run_in(self, directory: Path) -> bool:
        """Whether an attempt of this job has begun the run in `directory`."""
        return read_json(directory / "status.json").get("job") == str(self.id)

    def requeue(self, directory: Path, step: int | None) -> str:
        """Requeue this job. Returns why not; empty if Slurm accepted, which may kill this process at any moment.

        Args:
            directory: of the run; the step that each attempt reached is recorded there.
            step: of the newest checkpoint; None without one.
        """
        if self.restarts >= self.max_requeues:
            return f"it was requeued {self.restarts} times, and MAX_REQUEUES is {self.max_requeues}"
        steps = [*read_json(directory / _ATTEMPTS).get(str(self.id), ()), step]
        if steps[-_MAX_IDLE - 1 :].count(step) > _MAX_IDLE:
            return f"{_MAX_IDLE} attempts in a row got no step further; it needs a longer --time"
        try:
            directory.mkdir(parents=True, exist_ok=True)  # the run may have stopped before creating it
            write_json(directory / _ATTEMPTS, {str(self.id): steps})
            command = ["scontrol", "requeue", str(self.id)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except FileNotFoundError as error:
            return f"{error.filename} is not on this node"
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return "" if result.returncode == 0 else "scontrol says: " + " ".join(result.stderr.split())


def gpus_per_node(env: Mapping[str, str] = os.environ) -> int:
    """GPUs that the job requested per node; else those allocated here; else those visible.

    Raises:
        UserError: a variable is wrong.
    """
    asked = env.get("SLURM_GPUS_PER_NODE")
    if asked:  # N or TYPE:N or TYPE, which means one, or several of these
        parts = [re.fullmatch("(?:[^:]+:)?([0-9]{1,5})|[^:]*[A-Za-z][^:]*", part) for part in asked.split(",")]
        if None in parts:
            raise UserError(f"SLURM_GPUS_PER_NODE is {asked[:80]!r}; valid: a number of GPUs such as 4, or a100:4.")
        return sum(int(part[1] or 1) for part in parts if part)
    allocated = optional_number("SLURM_GPUS_ON_NODE", env)
    if allocated is not None:
        return allocated
    if "CUDA_VISIBLE_DEVICES" in env:
        return len(re.findall(r"(?:^|,)\s*(?:[0-9]|GPU-|MIG-)", env["CUDA_VISIBLE_DEVICES"]))  # -1 hides all
    return len(re.findall("^GPU", _output("nvidia-smi", "--list-gpus"), flags=re.MULTILINE))


def processes_per_node(env: Mapping[str, str] = os.environ) -> int:
    """NPROC_PER_NODE; else the job's GPUs per node; else --ntasks-per-node if above 1; else 2, or 1 on one processor.

    Without GPUs two, because the presets for CPUs have two micro-batches; each process has train.threads.

    Raises:
        UserError: NPROC_PER_NODE or a variable of Slurm is not a number.
    """
    asked = env.get("NPROC_PER_NODE")
    if asked:
        if not re.fullmatch("[1-9][0-9]{0,3}", asked):
            raise UserError(f"NPROC_PER_NODE is {asked}; valid: 1 to 9999.")
        return int(asked)
    tasks = optional_number("SLURM_NTASKS_PER_NODE", env) or 0
    without = tasks if tasks > 1 else min(2, num_processors())
    return gpus_per_node(env) or without


def first_address(env: Mapping[str, str] = os.environ) -> str:
    """The address of this node, the first of the job, for the other nodes.

    The one that Slurm uses, because a node's name may not resolve. Without scontrol, as in some containers, the name.
    """
    name = env.get("SLURMD_NODENAME") or socket.gethostname()
    found = re.search(r"\bNodeAddr=(\S+)", _output("scontrol", "--oneliner", "show", "node", name))
    return found[1] if found else name


def _output(*command: str) -> str:
    """What a program prints; empty if it is missing or does not end within a minute."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    return ""


def free_port(job_id: int) -> int:
    """A free port on this node for the job's rendezvous, derived from the job id so that jobs on one node differ."""
    ports = (_FIRST_PORT + (job_id + 97 * attempt) % _NUM_PORTS for attempt in range(_NUM_PORTS))
    return next(port for port in ports if not is_port_in_use(port))
