"""A Slurm job seen from its batch script, on its first node: what it was given, its job steps, its requeue.

Tried with Slurm 22.05. Nothing here needs torch, so that a signal finds its handler as soon as the script starts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cifar_dist.errors import PeerError, StopError, UserError
from cifar_dist.files import write_text_atomic

# Ports below those that the kernel gives away by itself, so that only another program's fixed port is ever met.
_FIRST_PORT, _NUM_PORTS = 16_384, 16_384
# A signal that comes while srun is still starting the tasks may be lost.
_REPEAT_S = 10.0
# How long other nodes may take to end after the first one has. Those that live notice a lost peer in seconds. Slurm
# notices a lost node after SlurmdTimeout (300 s unless set), and requeues the job then, unless that has ended before.
_LAST_NODE_S = 600
_SITTINGS = "sittings.json"
_MAX_IDLE = 3  # sittings in a row that may come no step further


@dataclass(frozen=True)
class Job:
    """The job of this process, from the environment that Slurm gives to a batch script."""

    id: int
    restarts: int
    num_nodes: int
    array_id: int | None
    array_index: int | None
    array_size: int | None
    max_requeues: int

    @property
    def label(self) -> str:
        """A name for the job that stays when it is requeued."""
        return f"job-{self.id}" if self.array_id is None else f"job-{self.array_id}-{self.array_index}"

    @classmethod
    def current(cls, env: Mapping[str, str] = os.environ) -> Job:
        """Read the environment.

        Raises:
            UserError: this is no batch job, or a variable of the user's is wrong.
        """
        if "SLURM_JOB_ID" not in env:
            raise UserError("this script is for Slurm: sbatch slurm/train.sh. Without Slurm, use launch/node.")

        def number(name: str) -> int | None:
            return int(env[name]) if env.get(name) else None

        bound = env.get("MAX_REQUEUES", "20")
        if not bound.isdigit():
            raise UserError(f"MAX_REQUEUES is {bound}; valid: 0 or more.")
        return cls(
            id=int(env["SLURM_JOB_ID"]),
            restarts=number("SLURM_RESTART_COUNT") or 0,
            num_nodes=number("SLURM_JOB_NUM_NODES") or 1,
            array_id=number("SLURM_ARRAY_JOB_ID"),
            array_index=number("SLURM_ARRAY_TASK_ID"),
            array_size=number("SLURM_ARRAY_TASK_COUNT"),
            max_requeues=int(bound),
        )


def gpus_per_node(env: Mapping[str, str] = os.environ) -> int:
    """The GPUs that this job asked for on each node, else those that it was given here, else those that are visible."""
    for name in ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        found = re.search(r"(\d+)$", env.get(name, ""))  # a type may stand in front: a100:4
        if found:
            return int(found[1])
    if "CUDA_VISIBLE_DEVICES" in env:
        return sum(bool(device) for device in env["CUDA_VISIBLE_DEVICES"].split(","))
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())


def processes_per_node(env: Mapping[str, str] = os.environ) -> int:
    """NPROC_PER_NODE; else the job's GPUs on a node; else --ntasks-per-node, should it be more than 1; else 2, which
    without GPUs are faster than one process with all processors, or 1 where there is one processor.

    Raises:
        UserError: NPROC_PER_NODE is no number.
    """
    asked = env.get("NPROC_PER_NODE")
    if asked:
        if not re.fullmatch("[1-9][0-9]{0,3}", asked):
            raise UserError(f"NPROC_PER_NODE is {asked}; valid: 1 to 9999.")
        return int(asked)
    tasks = env.get("SLURM_NTASKS_PER_NODE", "")
    without = int(tasks) if tasks.isdigit() and int(tasks) > 1 else min(2, len(os.sched_getaffinity(0)))
    return gpus_per_node(env) or without


def first_address(env: Mapping[str, str] = os.environ) -> str:
    """The address of this node, the first of the job, for the others.

    It is the one at which Slurm itself reaches the node, since a node's name need not mean anything to the network.
    Without scontrol, as in some containers, the name must do.
    """
    name = env.get("SLURMD_NODENAME", socket.gethostname())
    try:
        command = ["scontrol", "--oneliner", "show", "node", name]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else name


def free_port(job_id: int) -> int:
    """A port on this node for the job's rendezvous: by its number, so that jobs on one node do not meet, and passing
    over those at which something else listens."""
    for attempt in range(100):
        port = _FIRST_PORT + (job_id + 97 * attempt) % _NUM_PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one in TIME_WAIT is free
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError("a hundred ports from 16384 on are in use on this node. Give MASTER_PORT.")


class Steps:
    """Runs job steps under srun, and passes on to them the wish to stop that reaches the batch script.

    Slurm's own SIGTERM, at the time limit or by scancel, reaches every process of a step, and the script too. A signal
    for the script alone (`--signal=B:USR1@120`) does not; srun passes a SIGUSR1 on, while a SIGTERM would make it kill.
    """

    def __init__(self) -> None:
        self.wish: signal.Signals | None = None
        self._running: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.wish = self.wish or signal.Signals(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if self.wish is not None and self._running is not None and self._running.poll() is None:
            self._running.send_signal(signal.SIGUSR1)

    def run(self, job: Job, command: Sequence[str], env: Mapping[str, str], num_nodes: int | None = None) -> int:
        """Run `command` once on each node, on the first `num_nodes` if given; the greatest exit code of all nodes.

        A task may use all that the job has on its node. Nodes end by themselves, each with its own message.
        """
        if self.wish is not None:
            return StopError.exit_code
        nodes = str(num_nodes or job.num_nodes)
        options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--cpu-bind=none"]
        options += ["--kill-on-bad-exit=0", f"--wait={_LAST_NODE_S}"]
        if "SLURM_GPUS_ON_NODE" in os.environ:  # of a job that is alone on its nodes a step gets no GPUs unasked
            options.append(f"--gpus-per-node={gpus_per_node()}")
        self._running = subprocess.Popen(["srun", *options, *command], env=env)
        repeating = threading.Event()
        threading.Thread(target=self._repeat, args=(repeating,), daemon=True).start()
        try:
            self._pass_on()  # what came before there was anything to pass it on to
            code = self._running.wait()
        finally:
            repeating.set()
            self._running = None
        return code if code >= 0 else PeerError.exit_code

    def _repeat(self, over: threading.Event) -> None:
        while not over.wait(_REPEAT_S):
            self._pass_on()


def left_in(directory: Path, job: Job) -> tuple[int | None, int | None]:
    """The exit code and the step of the newest checkpoint in the status.json of a run, should it be of this job since
    its last requeue; else None.

    That code says more than srun's, which is but the greatest of all nodes' codes.
    """
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
        if (status["job"], status["restarts"]) == (str(job.id), job.restarts):
            return status["exit_code"], status["last_checkpoint_step"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, None


def requeue(job: Job, directory: Path, step: int | None) -> str:
    """Ask Slurm to run this job again; empty when it will, and may end this process at any moment, else why not.

    Args:
        directory: of the run, in which it is noted how far each sitting came.
        step: of the newest checkpoint, None if there is none.
    """
    if job.restarts >= job.max_requeues:
        return f"it was requeued {job.restarts} times, and MAX_REQUEUES is {job.max_requeues}"
    sittings = [*_sittings(directory, job), step]
    if len(sittings) > _MAX_IDLE and len(set(sittings[-_MAX_IDLE - 1 :])) == 1:
        return f"{_MAX_IDLE} sittings in a row came no step further; it needs a longer --time"
    try:
        directory.mkdir(parents=True, exist_ok=True)  # the run may have been stopped before it made it
        write_text_atomic(directory / _SITTINGS, json.dumps({"job": job.id, "last_steps": sittings}))
        command = ["scontrol", "requeue", str(job.id)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        return f"{error.filename} is not on this node"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if result.returncode == 0 else "scontrol says: " + " ".join(result.stderr.split())


def _sittings(directory: Path, job: Job) -> list[int | None]:
    """The newest step after each sitting of this job so far."""
    try:
        noted = json.loads((directory / _SITTINGS).read_text(encoding="utf-8"))
        return list(noted["last_steps"]) if noted["job"] == job.id else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
