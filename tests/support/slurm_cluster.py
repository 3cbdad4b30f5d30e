"""A private Slurm of two nodes on this machine: Debian's slurmctld, slurmd and munged, in its own folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support import runs

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n1", "n2")
# What Slurm waits for is shortened: a requeued job waits for cred_expire (two minutes unless set, 5 s at least), and a
# job that is submitted beside others for sched_interval.
_CONFIG = """\
ClusterName=cifar_dist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/none.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=25
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=n[1-2] MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class SlurmCluster:
    """Started when entered, stopped with all its jobs when left; touches no other Slurm.

    Args:
        folder: empty, for configuration, state, keys and logs; its path is short, as sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        others = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = others | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o700)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller_port, *node_ports = (runs.free_port() for _ in range(1 + len(NODES)))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
            "Gres=gpu:a100:2 Feature=a100 State=UNKNOWN"
            for name, port in zip(NODES, node_ports, strict=True)
        )
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        text = _CONFIG.format(host=host, controller_port=controller_port, user=user, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        for number in (0, 1):  # GPUs in name: no device stands behind them
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu Type=a100 File={self.folder}/gpu[0-1]\n")
        try:
            munge = self.folder / "munge"
            files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
            self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
            self._wait((munge / "socket").exists)
            self._start("slurmctld", "-D", "-c")
            for name in NODES:
                self.start_node(name)
            self._wait(lambda: self._states() == {"idle"})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in reversed(self._daemons):
            self.stop(name)
        for pid in self._processes():  # a slurmstepd outlives its slurmd
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        self._start(name, "-D", "-N", name, program="slurmd")

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop a daemon: munged, slurmctld or a node's slurmd. The jobs of a node keep running."""
        daemon = self._daemons[name]
        daemon.send_signal(number)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def crash(self, name: str) -> None:
        """Kill a node's slurmd and everything that it runs, as when the node is lost."""
        self.stop(name, signal.SIGKILL)
        for pid in self._processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def report_lost(self, name: str) -> None:
        """Tell Slurm that a node is down, as an administrator does; by itself Slurm notices in half a minute."""
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")

    def restore(self) -> None:
        """Cancel all jobs and bring all nodes back."""
        self.cancel_all()
        for name in NODES:
            if self._daemons[name].poll() is not None:
                self.start_node(name)
        self._wait(lambda: self._states() == {"idle"})

    def cancel_all(self) -> None:
        self.command("scancel", "--me", check=False)
        deadline = time.monotonic() + 40
        while self.command("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.1)

    def submit(self, *words: str | Path, **environment: str) -> str:
        """The number of the job that sbatch makes of the words, from within the repository."""
        command = ["sbatch", "--parsable", *map(str, words)]
        return self.command(*command, cwd=runs.REPOSITORY, env=environment).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, CANCELLED and so on; the number of an array stands for all of its jobs."""
        shown = self.command("scontrol", "--oneliner", "show", "job", job)
        states = sorted(set(re.findall(r"JobState=(\w+)", shown)))
        return states[0] if len(states) == 1 else "+".join(states)

    def wait(self, job: str, states: Collection[str] = ("COMPLETED",), limit_s: float = 240) -> None:
        """Wait until a job is in one of the states; no other end is accepted."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            over = not set(state.split("+")) & {"PENDING", "RUNNING", "COMPLETING", "COMPLETED"}
            if over or time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {state}")
            time.sleep(0.2)

    def command(self, *words: str, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] = {}) -> str:
        """Run one of Slurm's commands on this cluster and return what it prints."""
        result = subprocess.run(
            words, env=self.environment | dict(env), cwd=cwd, capture_output=True, text=True, check=False
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def _start(self, name: str, *arguments: str, program: str | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program or name, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def _processes(self, node: str | None = None) -> list[int]:
        """What runs in jobs of this cluster, on one node or on all, and the slurmstepds above."""
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                if env.get("SLURM_CONF") != self.environment["SLURM_CONF"] or "SLURM_JOB_ID" not in env:
                    continue
                if node in (None, env.get("SLURMD_NODENAME")):
                    found.add(process.pid)
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        found.add(parent.pid)
        return sorted(found)

    def _states(self) -> set[str]:
        return set(self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def _wait(self, condition: Callable[[], bool], limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.1)

    def _logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


class Submission:
    """A job of slurm/`script`.sh with its output and its run directory, whose path has a space."""

    def __init__(
        self, cluster: SlurmCluster, data_dir: Path, folder: Path, sbatch: tuple[str, ...], settings: tuple[str, ...],
        script: str = "train", **environment: str,
    ) -> None:  # fmt: skip
        self.cluster, self.directory, self.log = cluster, folder / "a run", folder / "%x-%A_%a.out"
        places = ("--data.dir", str(data_dir), "--data.stage_dir", str(folder / "stage"), "--run.dir", self.directory)
        self.folder = folder
        self.job = cluster.submit(
            *sbatch, f"--output={folder}/%j.out", f"slurm/{script}.sh", *settings, *places, **environment
        )

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def wait(self, *states: str) -> str:
        try:
            self.cluster.wait(self.job, states or ("COMPLETED",))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None
        return self.output

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(done >= step for done in runs.logged_steps(self.directory)))

    def wait_for_restart(self) -> None:
        self.wait_until(lambda: "Restarts=0" not in self.cluster.command("scontrol", "show", "job", self.job))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.cluster.state(self.job) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    @contextmanager
    def paused(self) -> Iterator[list[int]]:
        """Hold all ranks, so that what Slurm takes its time for comes in the middle of a run of seconds."""
        ranks = [
            pid for pid in runs.children_with(str(self.directory)) if "LOCAL_RANK" in psutil.Process(pid).environ()
        ]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield ranks
        finally:
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @property
    def status(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return values


def pending(pid: int) -> set[signal.Signals]:
    """The signals that a stopped process will get."""
    masks = re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return {number for number in signal.Signals for mask in masks if int(mask, 16) >> (number - 1) & 1}
