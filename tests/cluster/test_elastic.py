"""Runs that restart by themselves: lost processes, and other numbers of processes and nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.training.checkpoint import all_steps
from tests.scripts.test_launch import start
from tests.support import runs
from tests.support.machines import listens, lose, machine, trainers
from tests.support.runs import free_port

pytestmark = [pytest.mark.run, pytest.mark.data]
OPTIONS = runs.TWO_RANKS


def wait_for_checkpoint(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    runs.wait_until(lambda: max(all_steps(run_dir / "checkpoints"), default=0) >= step, process)


def is_asked_to_stop(pid: int) -> bool:
    """Whether SIGTERM waits for that suspended process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


@pytest.mark.slow
def test_killed_rank_is_restarted(two_ranks: Path, data_dir: Path, tmp_path: Path) -> None:
    """Twice, because the second restart finds what the first one left behind."""
    run_dir = tmp_path / "run"
    arguments = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    process = start("node", *arguments, NPROC_PER_NODE="2", MAX_RESTARTS="2")
    for step, rank in ((10, 1), (40, 0)):
        wait_for_checkpoint(run_dir, step, process)
        os.kill(trainers(run_dir)[rank], signal.SIGKILL)
    output = runs.finish(process)
    assert len(re.findall(r"error: rank \d was killed by SIGKILL", output)) == 2
    assert "restarting from the last checkpoint, restart 1 of 2" in output
    assert "restarting from the last checkpoint, restart 2 of 2" in output
    assert output.count("resuming from") == 2
    assert "Traceback" not in output
    runs.assert_same(run_dir, two_ranks)
    assert runs.summary(run_dir).keys() == runs.summary(two_ranks).keys()
    assert runs.records_without_times(run_dir) == runs.records_without_times(two_ranks)
    assert runs.children_with(str(run_dir)) == []


@pytest.mark.slow
def test_killed_rank_of_two_machines(two_ranks: Path, data_dir: Path, tmp_path: Path) -> None:
    run_dir, port = tmp_path / "run", free_port()
    arguments = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    machines = [machine(k, port, *arguments, NNODES="2", MAX_RESTARTS="1") for k in range(2)]
    wait_for_checkpoint(run_dir, 10, machines[0])
    os.kill(trainers(run_dir)[1], signal.SIGKILL)
    outputs = [runs.finish(process) for process in machines]
    assert "restart 1 of 1" in "".join(outputs)  # the other one may join before it sees its own process fail
    assert "".join(outputs).count("resuming from") == 1
    assert "Traceback" not in "".join(outputs)
    runs.assert_same(run_dir, two_ranks)
    assert runs.records_without_times(run_dir) == runs.records_without_times(two_ranks)
    assert runs.children_with(str(run_dir)) == []


def test_errors_that_would_repeat_are_not_restarted(data_dir: Path, tmp_path: Path) -> None:
    """A loss that explodes, or first its gradient, stops every rank, with one message and nothing saved."""
    explodes = ("--optim.name", "sgd", "--optim.lr", "1e5", "--train.checkpoint_every_steps", "0")
    arguments = (*OPTIONS, *explodes, "--data.dir", data_dir, "--run.dir", tmp_path / "run")
    output = runs.finish(start("node", *arguments, NPROC_PER_NODE="2", MAX_RESTARTS="3"), expected=5)
    assert "cifar_dist.doctor" not in output
    assert len(re.findall("the (?:loss|gradient) became infinite", output)) == 1
    assert output.count("error: ") == 1
    assert "restarting from" not in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 5
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert runs.children_with(str(tmp_path)) == []


def test_restarts_need_resume_auto(tmp_path: Path) -> None:
    options = ("--run.dir", tmp_path / "run", "--run.resume", "never")
    output = runs.finish(start("node", *options, MAX_RESTARTS="1"), expected=2)
    assert "--run.resume auto" in output
    assert "MAX_RESTARTS=0" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("NNODES", "2:1"),
        ("NNODES", "all"),
        ("MAX_RESTARTS", "-1"),
        ("MEET_TIMEOUT_S", "soon"),
        ("MASTER_PORT", "65536"),
    ],
)
def test_mistyped_numbers_of_machines(setting: str, value: str) -> None:
    assert f"{setting} is {value}" in runs.finish(start("multinode", **{setting: value}), expected=2)


@pytest.mark.parametrize("port", ["ten", "99999", " 29500"])
def test_a_wrong_port_of_the_launcher(port: str) -> None:
    """Without launch/multinode, as in a Slurm job."""
    rendezvous = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    command = [sys.executable, "-m", "cifar_dist.cluster.launcher", *rendezvous, "-m", "cifar_dist.train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: MASTER_ADDR:MASTER_PORT: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("changing", [{"NNODES": "1:2"}, {"NNODES": "2", "MAX_RESTARTS": "1"}])
def test_nodes_with_fixed_ranks_are_not_restarted(changing: dict[str, str]) -> None:
    output = runs.finish(start("multinode", MASTER_ADDR="127.0.0.1", NODE_RANK="0", **changing), expected=2)
    assert "Leave NODE_RANK out" in output


def test_machine_is_lost_and_another_joins(two_ranks: Path, data_dir: Path, tmp_path: Path) -> None:
    """Two nodes, then one, then two again; the remaining one is suspended meanwhile, so that it does not finish."""
    run_dir, port = tmp_path / "run", free_port()
    arguments = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    first = machine(0, port, *arguments, NNODES="1:2")
    runs.wait_until(lambda: listens(port), first)
    second = machine(1, port, *arguments, NNODES="1:2")
    wait_for_checkpoint(run_dir, 10, first)
    lose(second)
    at = max(all_steps(run_dir / "checkpoints"))
    wait_for_checkpoint(run_dir, at + 10, first)
    (alone,) = trainers(run_dir)
    os.kill(alone, signal.SIGSTOP)
    third = machine(1, port, *arguments, NNODES="1:2")
    runs.wait_until(lambda: is_asked_to_stop(alone), first)
    os.kill(alone, signal.SIGCONT)
    output = runs.finish(first)
    joined = runs.finish(third)
    assert "rank 0 on" in output
    assert re.search(r"rank 0 on \S+ lost contact with rank 1 on ", output)
    assert "restart 1 of 3" in output
    assert "restart 2 of 3" not in output
    assert [int(n) for n in re.findall(r"\(16 x (\d) x \d accumulated\)", output + joined)] == [2, 1, 2]
    assert "Traceback" not in output
    assert runs.summary(run_dir)["world_size"] == 2
    runs.assert_same(run_dir, two_ranks)
    assert runs.records_without_times(run_dir) == runs.records_without_times(two_ranks)
    assert runs.children_with(str(run_dir)) == []


@pytest.mark.slow
def test_surplus_node_waits_and_exits(data_dir: Path, tmp_path: Path) -> None:
    """It is told that the run ended, or finds that the other node has gone."""
    run_dir, port = tmp_path / "run", free_port()
    arguments = (*OPTIONS, "--train.max_steps", "60", "--data.dir", data_dir, "--run.dir", run_dir)
    first = machine(0, port, *arguments, NNODES="1:1")
    runs.wait_until(lambda: listens(port), first)
    second = machine(1, port, *arguments, NNODES="1:1")
    assert "restart" not in runs.finish(first)
    output, _ = second.communicate(timeout=60)
    said = {0: "the run ended without this node", 6: "the node with that address is gone"}
    assert said[second.returncode] in output
    assert "Traceback" not in output
    assert runs.summary(run_dir)["world_size"] == 1


@pytest.mark.slow
def test_number_of_machines_that_does_not_divide(data_dir: Path, tmp_path: Path) -> None:
    """One or three would do, but two come."""
    port = free_port()
    arguments = (
        *OPTIONS,
        "--train.batch_size",
        "96",
        "--train.micro_batch_size",
        "32",
        "--data.dir",
        data_dir,
        "--run.dir",
        tmp_path / "run",
    )
    machines = [machine(k, port, *arguments, NNODES="1:3") for k in range(2)]
    outputs = [runs.finish(process, expected=2) for process in machines]
    text = "error: train.batch_size 96 is no multiple of train.micro_batch_size 32 x 2 processes = 64."
    assert sum(output.count(text) for output in outputs) == 1
    assert all("restarting from" not in output and "Traceback" not in output for output in outputs)


@pytest.mark.slow
def test_four_two_one_and_three_processes_train_one_run(data_dir: Path, tmp_path: Path) -> None:
    """Each start but the last is stopped by SIGUSR1; the model is that of an uninterrupted run."""
    options = (*runs.SMALL, "--train.micro_batch_size", "8", "--train.max_steps", "20",
               "--train.log_every_steps", "1", "--run.resume", "auto", "--data.dir", data_dir)  # fmt: skip
    runs.finish(start("node", *options, "--run.dir", tmp_path / "whole", NPROC_PER_NODE="2"))
    run_dir = tmp_path / "parts"
    for world_size in (4, 2, 1, 3):
        before = max(all_steps(run_dir / "checkpoints"), default=0)
        cpu = runs.ON_ONE_CPU[-1] if world_size == 1 else ""
        process = start("node", *options, "--run.dir", run_dir, cpu=cpu, NPROC_PER_NODE=str(world_size))
        if world_size != 3:
            runs.wait_until(lambda at=before: max(runs.logged_steps(run_dir), default=0) > at + 1, process)  # type: ignore[misc]
            process.send_signal(signal.SIGUSR1)
        runs.finish(process, expected=0 if world_size == 3 else 75)
    assert runs.summary(run_dir)["world_size"] == 3
    runs.assert_same(run_dir, tmp_path / "whole")
    assert runs.records_without_times(run_dir) == runs.records_without_times(tmp_path / "whole")
