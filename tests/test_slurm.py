"""The batch scripts under a real Slurm of two nodes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cifar_dist import slurm
from cifar_dist.errors import UserError
from cifar_dist.training import checkpoint
from tests import runs, slurm_cluster
from tests.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.timeout(600)]
# Divides for 1, 2 and 4 ranks; takes long enough to be stopped in the middle.
OPTIONS = (*runs.SMALL, "--train.micro_batch_size", "8", "--train.precision", "fp32", "--train.log_every_steps", "5",
           "--train.checkpoint_every_steps", "0")  # fmt: skip
LONG = (*OPTIONS, "--train.max_steps", "300")
# In sweeps by two processes of one thread each: two threads of one wait very long for each other beside another job.
SHORT = (*OPTIONS, "--train.max_steps", "4")


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[SlurmCluster]:
    missing = slurm_cluster.missing_programs()
    if missing:
        text = f"SLURM IS NOT HERE ({', '.join(missing)}), SO ITS TESTS DID NOT RUN: apt-get install slurm-wlm munge"
        assert "CIFAR_DIST_REQUIRE_SLURM" not in os.environ, text
        pytest.skip(text)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with SlurmCluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    yield running_cluster
    running_cluster.restore()


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
        deadline = time.monotonic() + 120
        while not any(done >= step for done in runs.logged_steps(self.directory)):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def wait_for_restart(self) -> None:
        deadline = time.monotonic() + 120
        while "Restarts=0" in self.cluster.command("scontrol", "show", "job", self.job):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.2)

    @property
    def status(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return values


@pytest.fixture(scope="module")
def whole(running_cluster: SlurmCluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """A run over two nodes with two ranks on each, one per GPU of the job, that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    submission = Submission(running_cluster, data_dir, folder, ("--nodes=2", "--gpus-per-node=2"), LONG)
    submission.wait()
    return submission


def test_two_nodes_feed_what_one_process_feeds(whole: Submission, data_dir: Path, tmp_path: Path) -> None:
    figures = runs.summary(whole.directory)
    assert (figures["world_size"], figures["num_nodes"], figures["steps"]) == (4, 2, 300)
    assert f"dataset {whole.folder}/stage: verified 192 MB" in whole.output
    # In fewer, larger forward passes, which is quicker and feeds the same.
    runs.run(1, *LONG, "--train.micro_batch_size", "96", "--data.dir", data_dir, "--run.dir", tmp_path / "one")
    one = runs.summary(tmp_path / "one")
    assert (one["world_size"], one["num_nodes"]) == (1, 1)
    assert figures["data_receipt"] == one["data_receipt"]
    assert len(one["data_receipt"]) == 15


def test_time_limit_saves_requeues_and_goes_on(
    cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path
) -> None:
    """Slurm counts limits in minutes and signals up to one early, so the limit is set when training has begun."""
    started = time.monotonic()
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=2", "--time=20", "--signal=B:USR1@20"), LONG)
    submission.wait_for_step(5)
    minutes = math.ceil((time.monotonic() - started + 25) / 60)
    cluster.command("scontrol", "update", f"JobId={submission.job}", f"TimeLimit={minutes}")
    submission.wait_for_restart()
    cluster.command("scontrol", "update", f"JobId={submission.job}", "TimeLimit=20")
    output = submission.wait()
    (step,) = (int(number) for number in re.findall(r"stopped by SIGUSR1 after step (\d+), which is saved", output))
    assert 0 < step < 300
    assert "asks Slurm to requeue it (requeued 0 times so far)" in output
    assert f"step-{step:08d}.pt" in output.split("asks Slurm")[1]
    expected, found = runs.summary(whole.directory), runs.summary(submission.directory)
    for key in ("model_sha256", "data_receipt", "test_confusion", "steps", "num_nodes"):
        assert found[key] == expected[key], key
    assert runs.logged_steps(submission.directory) == runs.logged_steps(whole.directory)
    assert submission.status["restarts"] == 1


def test_cancelled_leaves_a_checkpoint_and_says_how_to_go_on(
    cluster: SlurmCluster, data_dir: Path, tmp_path: Path
) -> None:
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=2",), LONG)
    submission.wait_for_step(5)
    cluster.command("scancel", submission.job)
    output = submission.wait("CANCELLED")
    (step,) = checkpoint.all_steps(submission.directory / "checkpoints")
    path = checkpoint.path_of(submission.directory / "checkpoints", step)
    assert checkpoint.decode(checkpoint.read_verified(path), str(path))["step"] == step
    assert f"after step {step}, which is saved" in output
    assert re.search(r"^  sbatch slurm/train.sh --config .* --run.dir '.*/a run'$", output, flags=re.M)
    assert (submission.status["status"], submission.status["exit_code"]) == ("stopped", 75)
    assert "Traceback" not in output
    assert runs.children_with(str(submission.directory)) == []


def test_lost_node_is_replaced(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    """The second of two nodes is lost; the job may run on one, too."""
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=1-2",), LONG)
    submission.wait_for_step(5)
    cluster.crash("n2")
    submission.wait_for_restart()
    output = submission.wait()
    assert "2 x 2 processes" in output
    assert "1 x 2 processes" in output
    figures = runs.summary(submission.directory)
    assert (figures["num_nodes"], figures["steps"]) == (1, 300)


@pytest.mark.parametrize("jobs_live_on", [False, True])
def test_lost_first_node_is_replaced(
    jobs_live_on: bool, cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path
) -> None:
    """Where only Slurm's daemon is lost, the processes of the job train on, and have to go before another begins."""
    settings = (*LONG, "--train.checkpoint_every_steps", "10")
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=1",), settings)
    submission.wait_for_step(15)
    assert "BatchHost=n1" in cluster.command("scontrol", "show", "job", submission.job)
    if jobs_live_on:
        cluster.stop("n1", signal.SIGKILL)
    else:
        cluster.crash("n1")
    submission.wait_for_restart()
    output = submission.wait()
    assert "going on from" in output
    found = runs.summary(submission.directory)
    assert found["data_receipt"] == runs.summary(whole.directory)["data_receipt"]
    assert runs.logged_steps(submission.directory) == runs.logged_steps(whole.directory)


def test_array_of_seeds_ends_with_one_table(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    submission = Submission(cluster, data_dir, tmp_path, ("--array=0-2",), SHORT, script="sweep", NPROC_PER_NODE="2")
    output = submission.wait()
    assert output.count("95% interval of the mean") == 1
    assert re.findall(r"^seed (\d)", output, flags=re.M) == ["0", "1", "2"]
    figures = json.loads((submission.directory / "seeds.json").read_text())
    accuracies = [runs.summary(submission.directory / f"seed-{seed}")["test_accuracy"] for seed in range(3)]
    assert figures["num_runs"] == 3
    assert figures["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)


def test_array_over_a_grid(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    grid = tmp_path / "my grid.txt"
    grid.write_text("# rates\n--optim.lr 0.1\n\n--optim.lr 0.2 --optim.momentum 0.8\n")
    settings = ("--grid", str(grid), *SHORT)
    submission = Submission(cluster, data_dir, tmp_path, ("--array=0-3",), settings, "sweep", NPROC_PER_NODE="2")
    output = submission.wait()
    assert len(re.findall(r"^--optim.lr 0.\d.* 2 .* \+- ", output, flags=re.M)) == 2
    figures = json.loads((submission.directory / "seeds.json").read_text())
    assert figures["settings"]["--optim.lr 0.1"]["num_runs"] == 2
    assert {run["seed"] for run in figures["settings"]["--optim.lr 0.2 --optim.momentum 0.8"]["runs"]} == {0, 1}


def test_evaluate(cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path) -> None:
    path = checkpoint.path_of(whole.directory / "checkpoints", 300)
    words = ("--checkpoint", path, "--data_dir", data_dir, "--json", tmp_path / "score.json")
    job = cluster.submit(f"--output={tmp_path}/out", "slurm/evaluate.sh", *words)
    cluster.wait(job)
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["confusion"] == runs.summary(whole.directory)["test_confusion"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train", ("--train.epoch", "3"), "epochs"),
        ("train", ("--train.batch_size", "50"), "Nearest valid choices"),
        ("sweep", (), "--array"),
    ],
)
def test_mistakes(script: str, options: tuple[str, ...], message: str, cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit(f"--output={tmp_path}/out", f"slurm/{script}.sh", *options)
    cluster.wait(job, ["FAILED"])
    output = (tmp_path / "out").read_text()
    assert "ExitCode=2:0" in cluster.command("scontrol", "show", "job", job)
    assert message in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 20


def test_submitted_from_elsewhere(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = ["sbatch", "--parsable", f"--output={tmp_path}/out", str(runs.REPOSITORY / "slurm/train.sh")]
    job = cluster.command(*words, "--print-config", cwd=tmp_path).strip()
    cluster.wait(job, ["FAILED"])
    assert "CIFAR_DIST_HOME" in (tmp_path / "out").read_text()
    home = {"CIFAR_DIST_HOME": str(runs.REPOSITORY)}
    cluster.wait(cluster.command(*words, "--print-config", cwd=tmp_path, env=home).strip())
    assert "micro_batch_size: 128" in (tmp_path / "out").read_text()


def test_bounded_requeues(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    submission = Submission(cluster, data_dir, tmp_path, (), LONG, MAX_REQUEUES="0")
    submission.wait_for_step(5)
    cluster.command("scancel", "--signal=USR1", "--batch", submission.job)
    output = submission.wait("FAILED")
    assert "which is saved" in output
    assert "not requeued: it was requeued 0 times, and MAX_REQUEUES is 0" in output
    assert "  sbatch slurm/train.sh --config" in output
    assert "ExitCode=75:0" in cluster.command("scontrol", "show", "job", submission.job)


def test_two_jobs_share_the_nodes(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    """Each with a processor of both nodes: their ports, locks and copies of the data do not meet."""
    part = ("--oversubscribe", "--nodes=2", "--cpus-per-task=1", "--mem=0")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    both = [Submission(cluster, data_dir, folder, part, SHORT, NPROC_PER_NODE="1") for folder in folders]
    for submission in both:
        submission.wait()
    receipts = [runs.summary(submission.directory)["data_receipt"] for submission in both]
    assert receipts[0] == receipts[1]
    started = [cluster.command("scontrol", "show", "job", submission.job) for submission in both]
    times = [re.findall(r"(?:StartTime|EndTime)=(\S+)", text) for text in started]
    assert times[1][0] < times[0][1], "they ran one after the other"


def test_processes_per_node() -> None:
    none = {"CUDA_VISIBLE_DEVICES": ""}
    assert slurm.processes_per_node(none) == min(2, os.cpu_count() or 1)
    assert slurm.processes_per_node({**none, "SLURM_NTASKS_PER_NODE": "3"}) == 3
    given = {**none, "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}
    assert slurm.processes_per_node(given) == 8
    assert slurm.processes_per_node({**given, "SLURM_GPUS_PER_NODE": "a100:4"}) == 4
    assert slurm.processes_per_node({**given, "NPROC_PER_NODE": "5"}) == 5
    assert slurm.processes_per_node({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    with pytest.raises(UserError, match="NPROC_PER_NODE is two"):
        slurm.processes_per_node({"NPROC_PER_NODE": "two"})


@pytest.mark.parametrize(("options", "gpus"), [((), 2), (("--gpus-per-node=1",), 1)])
def test_steps_get_the_gpus(options: tuple[str, ...], gpus: int, cluster: SlurmCluster, tmp_path: Path) -> None:
    """A job that is alone on its node is given all GPUs, but its steps are not by themselves."""
    code = "import os; from cifar_dist import slurm; slurm.Steps().run(slurm.Job.current(), ['env'], os.environ)"
    command = f'cd {shlex.quote(str(runs.REPOSITORY))} && {shlex.quote(sys.executable)} -c "{code}"'
    job = cluster.submit("--exclusive", *options, f"--output={tmp_path}/out", "--wrap", command)
    cluster.wait(job)
    assert f"SLURM_GPUS_ON_NODE={gpus}" in (tmp_path / "out").read_text().splitlines()


def test_sittings_that_come_no_further_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node without scontrol, as in a container, where each refusal has its own reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    first = slurm.Job.current({"SLURM_JOB_ID": "7"})
    steps = [None, None, 20, 40, 40, 40]
    for restarts, step in enumerate(steps):
        job = slurm.Job.current({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)})
        assert slurm.requeue(job, tmp_path, step) == "scontrol is not on this node"
    assert slurm.requeue(first, tmp_path, 40) == "3 sittings in a row came no step further; it needs a longer --time"
    assert slurm.requeue(first, tmp_path, 41) == "scontrol is not on this node"
    other = slurm.Job.current({"SLURM_JOB_ID": "8"})
    assert slurm.requeue(other, tmp_path, 41) == "scontrol is not on this node"
    bounded = slurm.Job.current({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"})
    assert "requeued 2 times" in slurm.requeue(bounded, tmp_path, 60)


def test_ports_of_jobs() -> None:
    assert slurm.free_port(5) == 16_384 + 5
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 16_384 + 6))
        taken.listen()
        assert slurm.free_port(6) == 16_384 + 6 + 97
    assert slurm.free_port(16_384 * 3 + 7) == 16_384 + 7
