"""Faults of one of several nodes: actions and messages of the others, and no process left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cifar_dist.training.checkpoint import all_steps
from tests.scripts.test_launch import LAUNCH, start
from tests.support import runs
from tests.support.machines import listens, lose, machine
from tests.support.runs import free_port

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("clock")]
HOST = socket.gethostname()
OPTIONS = (*runs.SMALL, "--train.precision", "fp32", "--train.max_steps", "4000", "--train.checkpoint_every_steps", "0",
           "--train.log_every_steps", "2", "--run.resume", "auto")  # fmt: skip
RENDEZVOUS = ["static", "c10d"]
SLOW = pytest.mark.slow
# In an empty network namespace, so that no other machine is contacted.
ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "alone")


def two_machines(
    rendezvous: str, *arguments: str | Path, port: str = "", **environment: str
) -> list[subprocess.Popen[str]]:
    """The first one opens the port and has rank 0."""
    port = port or free_port()
    places = [{"NODE_RANK": rank} if rendezvous == "static" else {} for rank in ("0", "1")]
    first = machine(0, port, *arguments, NNODES="2", **places[0], **environment)
    runs.wait_until(lambda: listens(port), first)
    return [first, machine(1, port, *arguments, NNODES="2", **places[1], **environment)]


def wait_for_end(run_dir: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while runs.children_with(str(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.data
@pytest.mark.parametrize(
    ("rendezvous", "lost"),
    [("c10d", 0), *(pytest.param(*case, marks=SLOW) for case in (("static", 0), ("static", 1), ("c10d", 1)))],
)
def test_lost_machine_is_named(rendezvous: str, lost: int, data_dir: Path, tmp_path: Path) -> None:
    """The node that hosts the rendezvous, and the other one."""
    run_dir = tmp_path / "run"
    machines = two_machines(rendezvous, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    runs.wait_until(lambda: runs.logged_steps(run_dir), machines[1 - lost])
    lose(machines[lost])
    lost_at = time.monotonic()
    output = runs.finish(machines[1 - lost], expected=6)
    assert time.monotonic() - lost_at < 20
    assert f"error: rank {1 - lost} on {HOST} lost contact with rank {lost} o" in output
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert output.count("cifar_dist.doctor` checks this machine") == 1
    wait_for_end(run_dir, 1)


@pytest.mark.data
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a process a host name of its own")
@pytest.mark.parametrize("place", ["kernel", pytest.param("device", marks=SLOW)])
def test_lost_machine_while_the_other_waits_for_its_device(place: str, data_dir: Path, tmp_path: Path) -> None:
    """As on GPUs, see `faulty`. The machines have names of their own, so neither sees the processes of the other."""
    port, launcher = free_port(), (sys.executable, "-m", "cifar_dist.cluster.launcher")
    options = (*OPTIONS, "--train.checkpoint_every_steps", "8", "--data.dir", str(data_dir), "--run.dir", str(tmp_path))
    machines = [
        runs.start_command([
            "unshare", "--uts", "sh", "-c", f'hostname machine-{rank}; exec "$@"', "", *launcher,
            "--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port,
            "--nproc-per-node", "1", runs.FAULTY, f"lose_behind_{place}:all:10", *options,
        ])
        for rank in (0, 1)
    ]  # fmt: skip
    assert runs.finish(machines[1], expected=6)
    lost_at = time.monotonic()
    output = runs.finish(machines[0], expected=6, timeout_s=30)
    assert time.monotonic() - lost_at < 20
    assert "error: rank 0 on machine-0 lost contact with rank 1 on machine-1" in output
    assert output.count("error: ") == 1
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 6
    wait_for_end(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.data
def test_lost_launcher_of_one_machine(data_dir: Path, tmp_path: Path) -> None:
    """Its process is still there, so all can save first."""
    run_dir = tmp_path / "run"
    machines = two_machines("static", *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    runs.wait_until(lambda: runs.logged_steps(run_dir), machines[0])
    machines[1].kill()
    machines[1].wait()
    output = runs.finish(machines[0], expected=75)
    (step,) = all_steps(run_dir / "checkpoints")
    assert f"stopped by SIGTERM after step {step}, which is saved" in output
    wait_for_end(run_dir, 10)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("rendezvous", RENDEZVOUS)
def test_rendezvous_node_stops_first(rendezvous: str, data_dir: Path, tmp_path: Path) -> None:
    """The launcher of the other one is suspended until the first has gone, with the port."""
    run_dir = tmp_path / "run"
    machines = two_machines(rendezvous, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    runs.wait_until(lambda: runs.logged_steps(run_dir), machines[0])
    (launcher,) = [pid for pid in runs.children_with("cifar_dist.cluster.launcher") if pid == machines[1].pid]
    os.kill(launcher, signal.SIGSTOP)
    machines[0].send_signal(signal.SIGUSR1)
    output = runs.finish(machines[0], expected=75)
    os.kill(launcher, signal.SIGCONT)
    other = runs.finish(machines[1], expected=75)
    (step,) = all_steps(run_dir / "checkpoints")
    assert f"stopped by SIGUSR1 after step {step}, which is saved" in output
    assert "Traceback" not in output + other
    wait_for_end(run_dir, 1)
    arguments = (*OPTIONS, "--train.max_steps", str(step), "--data.dir", data_dir, "--run.dir", run_dir)
    refused = runs.run(
        1, *arguments, expected=4
    )  # another number of steps is another run, read from a valid checkpoint
    assert f"step-{step:08d}.pt is of a run with other settings" in refused


@pytest.mark.data
@pytest.mark.parametrize("fault", ["missing", "different"])
def test_dataset_of_one_machine(fault: str, data_dir: Path, tmp_path: Path) -> None:
    """Each node has its own working directory with its own data; the second has no network."""
    port, run_dir = free_port(), tmp_path / "run"
    machines = []
    for rank in (0, 1):
        here = tmp_path / f"machine-{rank}"
        here.mkdir()
        if rank == 0:
            (here / "data").symlink_to(data_dir)
        elif fault == "different":
            shutil.copytree(data_dir, here / "data", ignore=shutil.ignore_patterns(".*"))
            with (here / "data" / "train.beton").open("r+b") as file:
                file.seek(80_000_000)  # in an image
                byte = file.read(1)[0]
                file.seek(80_000_000)
                file.write(bytes([byte ^ 1]))
        nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        environment = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "NPROC_PER_NODE": "1"}  # fmt: skip
        process = subprocess.Popen(
            [str(LAUNCH / "multinode"), *OPTIONS, "--data.dir", "data", "--run.dir", str(run_dir)],
            cwd=here,
            env=os.environ | environment | (nowhere if rank else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        machines.append(process)
    outputs = [runs.finish(process, expected=3) for process in machines]
    for output in outputs:  # from the node at fault and from rank 0
        assert output.count(f"error: rank 1 on {HOST}: data") == 1
        assert "Traceback" not in output
        assert len(output.splitlines()) < 30
    if fault == "different":
        assert "data/train.beton" in outputs[0]
    assert not run_dir.exists()


@contextmanager
def somebody_listens() -> Iterator[str]:
    """A program that takes connections, and never answers; its port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield str(server.getsockname()[1])


def test_port_in_use(tmp_path: Path) -> None:
    with somebody_listens() as port:
        started = time.monotonic()
        machines = [
            process
            for rendezvous in RENDEZVOUS
            for process in two_machines(rendezvous, *OPTIONS, "--run.dir", tmp_path / "run", port=port)
        ]
        for process in machines:
            output = runs.finish(process, expected=2)
            assert f"error: port {port} on 127.0.0.1 is in use by another program" in output
            assert "MASTER_PORT=" in output
            assert len(output.splitlines()) == 2
        assert time.monotonic() - started < 60  # of which 9 are to wait for an answer, others to import torch
    assert not (tmp_path / "run").exists()


# MASTER_ADDR, NODE_RANK, the exit code and the message of a launcher to which no other one comes.
ALONE_AT: list[tuple[str, str | None, int, str]] = [
    ("no-such-machine.invalid", None, 2, "error: MASTER_ADDR no-such-machine.invalid cannot be resolved"),
    ("192.0.2.1", None, 6, "error: nothing answered at 192.0.2.1:"),  # an address reserved for examples
    ("192.0.2.1", "0", 6, "warning: MASTER_ADDR 192.0.2.1 is not an address of this node"),
    ("127.0.0.1", "0", 6, f"error: {HOST} cannot connect to the other nodes at 127.0.0.1:"),
    ("127.0.0.1", "1", 6, f"error: {HOST} cannot connect to the other nodes at 127.0.0.1:"),
    ("127.0.0.1", None, 6, f"error: {HOST} cannot connect to the other nodes at 127.0.0.1:"),
]


def test_failed_rendezvous(tmp_path: Path) -> None:
    """All at once, as they do nothing but wait."""
    if subprocess.run([*ALONE, "true"], check=False).returncode:
        pytest.skip("NOT TESTED: machines that do not meet, as a network of its own takes root")
    started, launchers = time.monotonic(), []
    for address, rank, _, _ in ALONE_AT:
        place = {} if rank is None else {"NODE_RANK": rank}
        environment = {
            "NNODES": "2",
            "MASTER_ADDR": address,
            "MASTER_PORT": free_port(),
            "MEET_TIMEOUT_S": "3",
            **place,
        }
        variables = [f"{name}={value}" for name, value in environment.items()]
        under = () if address == "127.0.0.1" else ALONE
        words = [*under, "env", *variables, str(LAUNCH / "multinode"), *OPTIONS, "--run.dir", str(tmp_path / "run")]
        launchers.append(runs.start_command(words))
    for launcher, (_, _, code, said) in zip(launchers, ALONE_AT, strict=True):
        output = runs.finish(launcher, code)
        assert said in output
        assert "Traceback" not in output
        assert len(output.splitlines()) < 12
    assert time.monotonic() - started < 60  # each waits for 3 s; torch's own time-outs are minutes


@pytest.mark.slow
@pytest.mark.data
def test_two_jobs_on_one_machine(data_dir: Path, tmp_path: Path) -> None:
    """At the same time, with nothing that tells them apart but their run directories."""
    options = (*OPTIONS, "--train.max_steps", "2", "--data.dir", data_dir)
    jobs = [start("node", *options, "--run.dir", tmp_path / name, NPROC_PER_NODE="2") for name in ("a", "b")]
    for job in jobs:
        runs.finish(job)
    assert len({runs.summary(tmp_path / name)["model_sha256"] for name in ("a", "b")}) == 1
    assert runs.children_with(str(tmp_path)) == []
