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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cifar_dist.cluster import slurm_job
from cifar_dist.errors import UserError
from cifar_dist.training import checkpoint
from tests.support import runs, slurm_cluster
from tests.support.slurm_cluster import SlurmCluster, Submission

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.timeout(600)]
# Divides for 1, 2 and 4 ranks; takes long enough to be stopped in the middle.
OPTIONS = (*runs.SMALL, "--train.micro_batch_size", "8", "--train.precision", "fp32", "--train.log_every_steps", "5",
           "--train.checkpoint_every_steps", "0", "--eval.test_subset", "None")  # fmt: skip
STEPS = 40
WHOLE = (*OPTIONS, "--train.max_steps", str(STEPS))
# In fewer passes, for 1 and 2 ranks.
ENDLESS = (*OPTIONS, "--train.max_steps", "5000", "--train.micro_batch_size", "48")
SHORT = (*OPTIONS, "--train.max_steps", "4", "--train.micro_batch_size", "48")
# A job with one processor of each of its nodes, so that others run beside it.
PART = ("--oversubscribe", "--cpus-per-task=1", "--mem=0")
# It has two threads all the same, which wait very long for each other beside another job, unless they do so asleep.
ONE_PROCESS = {"NPROC_PER_NODE": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[SlurmCluster]:
    missing = slurm_cluster.missing_programs()
    if missing:
        text = f"SLURM IS NOT HERE ({', '.join(missing)}), SO ITS TESTS DID NOT RUN: apt-get install slurm-wlm munge"
        assert "CIFAR_DIST_REQUIRE_PROGRAMS" not in os.environ, text
        pytest.skip(text)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with SlurmCluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """For a test alone: no jobs of others, and all nodes there before and after it."""
    running_cluster.restore()
    yield running_cluster
    running_cluster.restore()


@pytest.fixture(scope="module")
def whole(running_cluster: SlurmCluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """A run over two nodes with two ranks on each, one per GPU of the job, that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    submission = Submission(running_cluster, data_dir, folder, ("--nodes=2", "--gpus-per-node=2"), WHOLE)
    submission.wait()
    return submission


def test_two_nodes_read_the_samples_of_one_process(whole: Submission, data_dir: Path, tmp_path: Path) -> None:
    figures = runs.summary(whole.directory)
    assert (figures["world_size"], figures["num_nodes"], figures["steps"]) == (4, 2, STEPS)
    # By the node that copied it, or by the other one.
    assert re.search(rf"copied to {whole.folder}/stage$|{whole.folder}/stage: verified 192 MB", whole.output, re.M)
    # In fewer, larger forward passes, which is quicker and feeds the same; the score is not looked at.
    quick = ("--train.micro_batch_size", "96", "--eval.test_subset", "500")
    runs.run(1, *WHOLE, *quick, "--data.dir", data_dir, "--run.dir", tmp_path / "one")
    one = runs.summary(tmp_path / "one")
    assert (one["world_size"], one["num_nodes"]) == (1, 1)
    assert figures["data_receipt"] == one["data_receipt"]
    assert len(one["data_receipt"]) == 2  # epochs


def test_evaluate(running_cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path) -> None:
    words = (whole.directory, "--data_dir", data_dir, "--json", tmp_path / "score.json")
    job = running_cluster.submit(f"--output={tmp_path}/out", "slurm/evaluate.sh", *words)
    running_cluster.wait(job)
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["confusion"] == runs.summary(whole.directory)["test_confusion"]


@pytest.mark.slow
def test_time_limit_saves_requeues_and_resumes(
    cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path
) -> None:
    """Slurm counts limits in minutes, looks at them each half minute, and signals up to one before."""
    started = time.monotonic()
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=2", "--time=20", "--signal=B:USR1@20"), WHOLE)
    submission.wait_for_step(5)
    with submission.paused() as ranks:
        minutes = math.ceil((time.monotonic() - started + 35) / 60)
        cluster.command("scontrol", "update", f"JobId={submission.job}", f"TimeLimit={minutes}")
        submission.wait_until(lambda: signal.SIGUSR1 in slurm_cluster.pending(ranks[0]))
    submission.wait_for_restart()
    cluster.command("scontrol", "update", f"JobId={submission.job}", "TimeLimit=20")
    output = submission.wait()
    (step,) = (int(number) for number in re.findall(r"stopped by SIGUSR1 after step (\d+), which is saved", output))
    assert 0 < step < STEPS
    assert "requeueing it (requeued 0 times so far)" in output
    assert f"step-{step:08d}.pt" in output.split("requeueing it")[1]
    runs.assert_same(submission.directory, whole.directory)
    assert runs.summary(submission.directory)["num_nodes"] == 2
    assert submission.status["restarts"] == 1


@pytest.fixture(scope="module")
def endless(
    running_cluster: SlurmCluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Submission]:
    """Two jobs side by side, each of which one test stops: one of two nodes, and one that may not be requeued."""
    both = {}
    for name, nodes, environment in (("cancelled", 2, {}), ("bounded", 1, {"MAX_REQUEUES": "0"})):
        sbatch = (*PART, f"--nodes={nodes}")
        folder = tmp_path_factory.mktemp(name)
        both[name] = Submission(running_cluster, data_dir, folder, sbatch, ENDLESS, **ONE_PROCESS, **environment)
    return both


def test_cancelled_job_saves_and_prints_how_to_resume(endless: dict[str, Submission]) -> None:
    submission = endless["cancelled"]
    submission.wait_for_step(5)
    submission.cluster.command("scancel", submission.job)
    output = submission.wait("CANCELLED")
    (step,) = checkpoint.all_steps(submission.directory / "checkpoints")
    path = checkpoint.path_of(submission.directory / "checkpoints", step)
    assert checkpoint.decode(checkpoint.read_verified(path), str(path))["step"] == step
    assert f"after step {step}, which is saved" in output
    assert re.search(r"^  sbatch slurm/train.sh --config .* --run.dir '.*/a run'$", output, flags=re.M)
    assert (submission.status["status"], submission.status["exit_code"]) == ("stopped", 75)
    assert "Traceback" not in output
    assert runs.children_with(str(submission.directory)) == []


def test_bounded_requeues(endless: dict[str, Submission]) -> None:
    submission = endless["bounded"]
    submission.wait_for_step(5)
    submission.cluster.command("scancel", "--signal=USR1", "--batch", submission.job)
    output = submission.wait("FAILED")
    assert "which is saved" in output
    assert "not requeued: it was requeued 0 times, and MAX_REQUEUES is 0" in output
    assert "  sbatch slurm/train.sh --config" in output
    assert "ExitCode=75:0" in submission.cluster.command("scontrol", "show", "job", submission.job)


@pytest.mark.slow
def test_lost_node_is_replaced(cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path) -> None:
    """The second of two nodes is lost, which Slurm itself notices; the job may run on one, too."""
    settings = (*WHOLE, "--train.checkpoint_every_steps", "5")
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=1-2",), settings)
    submission.wait_for_step(10)
    cluster.crash("n2")
    submission.wait_for_restart()
    output = submission.wait()
    assert "2 x 2 processes" in output
    assert "1 x 2 processes" in output
    assert "resuming from" in output
    assert runs.summary(submission.directory)["num_nodes"] == 1
    runs.assert_same(submission.directory, whole.directory)


@pytest.mark.parametrize("jobs_live_on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lost_first_node_is_replaced(
    jobs_live_on: bool, cluster: SlurmCluster, whole: Submission, data_dir: Path, tmp_path: Path
) -> None:
    """Where only Slurm's daemon is lost, the processes of the job train on, and have to go before another begins."""
    # Steps of many passes, of which most are left when the processes that live on are held no longer.
    slow = ("--train.micro_batch_size", "2") if jobs_live_on else ()
    settings = (*WHOLE, *slow, "--train.checkpoint_every_steps", "5", "--eval.test_subset", "500")
    submission = Submission(cluster, data_dir, tmp_path, ("--nodes=1",), settings)
    submission.wait_for_step(10)
    assert "BatchHost=n1" in cluster.command("scontrol", "show", "job", submission.job)
    if jobs_live_on:
        with submission.paused():
            cluster.stop("n1", signal.SIGKILL)
            cluster.report_lost("n1")
            submission.wait_until(lambda: "an earlier start of this job and was asked to" in submission.output)
    else:
        cluster.crash("n1")
        cluster.report_lost("n1")
    submission.wait_for_restart()
    output = submission.wait()
    assert "resuming from" in output
    # Micro-batches of 2 train another model.
    same = ("data_receipt",) if jobs_live_on else ("data_receipt", "model_sha256")
    runs.assert_same(submission.directory, whole.directory, *same)


def test_array_of_seeds_ends_with_one_table(running_cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    sbatch = ("--array=0-2", *PART)
    submission = Submission(running_cluster, data_dir, tmp_path, sbatch, SHORT, "sweep", **ONE_PROCESS)
    output = submission.wait()
    assert output.count("95% interval of the mean") == 1
    assert re.findall(r"^seed (\d)", output, flags=re.M) == ["0", "1", "2"]
    figures = json.loads((submission.directory / "seeds.json").read_text())
    accuracies = [runs.summary(submission.directory / f"seed-{seed}")["test_accuracy"] for seed in range(3)]
    assert figures["num_runs"] == 3
    assert figures["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)


@pytest.mark.slow
def test_array_over_a_grid(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    grid = tmp_path / "my grid.txt"
    grid.write_text("# rates\n--optim.lr 0.1\n\n--optim.lr 0.2 --optim.momentum 0.8\n")
    settings = ("--grid", str(grid), *SHORT)
    submission = Submission(cluster, data_dir, tmp_path, ("--array=0-3", *PART), settings, "sweep", **ONE_PROCESS)
    output = submission.wait()
    assert len(re.findall(r"^--optim.lr 0.\d.* 2 .* \+- ", output, flags=re.M)) == 2
    figures = json.loads((submission.directory / "seeds.json").read_text())
    assert figures["settings"]["--optim.lr 0.1"]["num_runs"] == 2
    assert {run["seed"] for run in figures["settings"]["--optim.lr 0.2 --optim.momentum 0.8"]["runs"]} == {0, 1}
    own = yaml.safe_load((submission.directory / "setting-1/seed-0/config.yaml").read_text())
    assert (own["track"]["group"], own["track"]["job_type"]) == (submission.directory.name, "setting-1")


class Site:
    """A home folder with site.sh of docs/slurm.md and the Python that it names, which notes where it was started."""

    def __init__(self, cluster: SlurmCluster, home: Path) -> None:
        self.cluster, self.home = cluster, home
        text = (runs.REPOSITORY / "docs/slurm.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"^    # site.sh\n(?:    .*\n|\n)+", text, flags=re.M)
        (home / "site.sh").write_text(re.sub("^    ", "", block, flags=re.M))
        python = home / "miniforge3/envs/cifar_dist/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "$SLURM_NODEID" >>"$HOME/started"\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (home / "logs").mkdir()

    def submit(self, *words: str) -> tuple[str, str]:
        """The number of the job that `sbatch WORDS` makes, and what scontrol shows of it."""
        # `module` is a function of the shell, which there is only where a site has it.
        start = (
            'module() { echo "$@" >"$HOME/module"; }; . ~/site.sh; export NPROC_PER_NODE=1; exec sbatch --parsable "$@"'
        )
        environment = {"HOME": str(self.home)}
        job = self.cluster.command("bash", "-euc", start, "-", *words, cwd=runs.REPOSITORY, env=environment).strip()
        return job, self.cluster.command("scontrol", "--oneliner", "show", "job", job)


def test_options_of_a_site(running_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Those of the file override the script's, and those of the command line override both."""
    site = Site(running_cluster, tmp_path)
    job, shown = site.submit("--hold", "slurm/train.sh")
    for setting in ("Account=my-project", "Partition=gpu", "Features=a100", "TresPerNode=gres:gpu:1",
                    f"StdOut={tmp_path}/logs/cifar_dist-{job}.out"):  # fmt: skip
        assert f" {setting} " in shown
    other, shown = site.submit("--hold", "--partition=all", "--account=other", "slurm/train.sh")
    assert " Account=other " in shown
    assert " Partition=all " in shown
    running_cluster.command("scancel", job, other)
    assert (tmp_path / "module").read_text() == "load cuda\n"


@pytest.mark.slow
def test_other_python(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    """Of a site, on both nodes, also if sbatch takes along nothing but its name."""
    site = Site(cluster, tmp_path)
    words = (
        "--data.dir",
        str(data_dir),
        "--data.stage_dir",
        str(tmp_path / "stage"),
        "--run.dir",
        str(tmp_path / "run"),
    )
    named = "--export=CIFAR_DIST_PYTHON,NPROC_PER_NODE,HOME"
    job, _ = site.submit("--nodes=2", named, "slurm/train.sh", *SHORT, *words, "--eval.test_subset", "500")
    try:
        cluster.wait(job)
    finally:
        print((tmp_path / f"logs/cifar_dist-{job}.out").read_text())
    assert runs.summary(tmp_path / "run")["num_nodes"] == 2
    assert set((tmp_path / "started").read_text().split("\n")) >= {"0", "1"}


@pytest.mark.slow
def test_container(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    """With a stand-in for apptainer, which there is no package of: it runs the command here. Stopped, then requeued."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "cifar_dist.sif").touch()
    apptainer = tmp_path / "bin/apptainer"
    apptainer.write_text(
        f"#!/bin/bash\n[[ $1 = exec && $2 = --nv && -e $3 ]] || exit 9\n"
        f'exec "{runs.REPOSITORY}${{4#/opt/cifar_dist}}" "${{@:5}}"\n'
    )
    apptainer.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{cluster.environment['PATH']}", "CIFAR_DIST_PYTHON": "/of the host", **ONE_PROCESS}
    settings = (*WHOLE, "--data.dir", str(data_dir), "--run.dir", "run", "--eval.test_subset", "500")
    words = ("sbatch", "--parsable", "--nodes=2", str(runs.REPOSITORY / "slurm/container.sh"), *settings)
    job = cluster.command(*words, cwd=tmp_path, env=env).strip()
    output, deadline = tmp_path / f"cifar_dist-{job}.out", time.monotonic() + 120
    while not any(step >= 5 for step in runs.logged_steps(tmp_path / "run")):
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    cluster.command("scancel", "--signal=USR1", job)
    while "Restarts=0" in cluster.command("scontrol", "show", "job", job):
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    cluster.wait(job)
    text = output.read_text()
    assert f"job {job}: stopped; requeueing it (requeued 0 times so far)" in text
    assert "resuming from" in text
    figures = runs.summary(tmp_path / "run")
    assert (figures["steps"], figures["num_nodes"], figures["world_size"]) == (STEPS, 2, 2)


MISTAKES = {
    "unknown key": ("train", ("--train.epoch", "3"), "epochs"),
    "batch size": ("train", ("--train.batch_size", "50"), "Nearest valid choices"),
    "no array": ("sweep", (), "--array"),
}
GPUS = {
    "2": (),
    "1": ("--gpus-per-node=1",),
    "1 of a type": ("--gpus-per-node=a100",),
    "1 of one type": ("--gpus-per-node=a100:1",),
    "1 by gres": ("--oversubscribe", "--gres=gpu:1"),
    "2 by gres, as the node is exclusive": ("--constraint=a100", "--gres=gpu:1"),
}
EXPORTS = {"nothing": "--export=NONE", "one": "--export=CIFAR_DIST_PYTHON=/mine", "all": "--export=ALL"}


class QuickJobs:
    """Jobs of a second, all submitted at once, since Slurm takes longer for one than it takes itself."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.numbers = {
            name: cluster.submit(f"--output={folder}/{name}", f"slurm/{script}.sh", *options)
            for name, (script, options, _) in MISTAKES.items()
        }
        for name, home in (("elsewhere", {}), ("from home", {"CIFAR_DIST_HOME": str(runs.REPOSITORY)})):
            words = ("sbatch", "--parsable", f"--output={folder}/{name}", str(runs.REPOSITORY / "slurm/train.sh"))
            self.numbers[name] = cluster.command(*words, "--print-config", cwd=folder, env=home).strip()
        code = "import os; from cifar_dist.cluster.slurm_job import *; Job().run(['env'], os.environ | {'NNODES': '5'})"
        start = f"cd {shlex.quote(str(runs.REPOSITORY))} && PYTHONPATH=. {shlex.quote(sys.executable)}"
        for name, options in (*GPUS.items(), *((name, (option,)) for name, option in EXPORTS.items())):
            output = f"--output={folder}/{name}"
            self.numbers[name] = cluster.submit("--exclusive", *options, output, "--wrap", f'{start} -c "{code}"')
        self.numbers["help"] = cluster.command(
            "sbatch", "--parsable", str(runs.REPOSITORY / "slurm/train.sh"), "--help", cwd=folder
        ).strip()
        (folder / "logs").mkdir()
        home = {"CIFAR_DIST_HOME": str(runs.REPOSITORY)}
        words = ("sbatch", "--parsable", "--output=logs/%x-%j.out", str(runs.REPOSITORY / "slurm/train.sh"))
        self.numbers["logs"] = cluster.command(*words, "--print-config", cwd=folder, env=home).strip()
        # A node with none of Slurm's programs in PATH.
        (folder / "bin").mkdir()
        for program in ("bash", "sed", "uname", "dirname"):
            (folder / "bin" / program).symlink_to(f"/usr/bin/{program}")
        options = (f"--export=ALL,PATH={folder}/bin", f"--output={folder}/no srun")
        self.numbers["no srun"] = cluster.submit(*options, "slurm/train.sh", "--run.dir", folder / "run")
        self.numbers["no folder"] = cluster.submit(f"--output={folder}/none/%j.out", "slurm/train.sh", "--help")

    def output_of(self, name: str, state: str, job: str = "") -> str:
        """What a job printed, once it has ended in `state`."""
        self.cluster.wait(job or self.numbers[name], [state])
        return (self.folder / name).read_text()


@pytest.fixture(scope="module")
def quick_jobs(running_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> QuickJobs:
    return QuickJobs(running_cluster, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, quick_jobs: QuickJobs) -> None:
    output = quick_jobs.output_of(name, "FAILED")
    assert "ExitCode=2:0" in quick_jobs.cluster.command("scontrol", "show", "job", quick_jobs.numbers[name])
    assert MISTAKES[name][2] in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 20


def test_submitted_from_elsewhere(quick_jobs: QuickJobs) -> None:
    assert "CIFAR_DIST_HOME" in quick_jobs.output_of("elsewhere", "FAILED")
    assert "micro_batch_size: 128" in quick_jobs.output_of("from home", "COMPLETED")


@pytest.mark.parametrize("gpus", GPUS)
def test_steps_get_the_gpus(gpus: str, quick_jobs: QuickJobs) -> None:
    """A job that is alone on its node is given all GPUs, but its steps are not by themselves."""
    assert f"SLURM_GPUS_ON_NODE={gpus[0]}" in quick_jobs.output_of(gpus, "COMPLETED").splitlines()


@pytest.mark.parametrize("export", EXPORTS)
def test_nodes_get_the_variables_of_the_run(export: str, quick_jobs: QuickJobs) -> None:
    """Whatever sbatch took along from where the job was submitted."""
    lines = quick_jobs.output_of(export, "COMPLETED").splitlines()
    assert "NNODES=5" in lines
    assert ("CIFAR_DIST_PYTHON=/mine" in lines) == (export == "one")


def test_help_in_a_job(quick_jobs: QuickJobs) -> None:
    """Without --output it is in the folder of submission, in a file that git ignores."""
    job = quick_jobs.numbers["help"]
    output = quick_jobs.output_of(f"cifar_dist-{job}.out", "COMPLETED", job)
    assert "  sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh --config configs/googlenet.yaml" in output.splitlines()


def test_output_in_another_folder(quick_jobs: QuickJobs) -> None:
    job = quick_jobs.numbers["logs"]
    assert "micro_batch_size" in quick_jobs.output_of(f"logs/cifar_dist-{job}.out", "COMPLETED", job)


def test_srun_is_missing(quick_jobs: QuickJobs) -> None:
    output = quick_jobs.output_of("no srun", "FAILED")
    assert "ExitCode=2:0" in quick_jobs.cluster.command("scontrol", "show", "job", quick_jobs.numbers["no srun"])
    assert "error: srun cannot be started on " in output
    assert "Traceback" not in output


def test_folder_of_output_is_missing(quick_jobs: QuickJobs) -> None:
    """Slurm creates no folder for --output, and the job fails without output (docs/slurm.md)."""
    quick_jobs.cluster.wait(quick_jobs.numbers["no folder"], ["FAILED"])
    assert not (quick_jobs.folder / "none").exists()
    scripts = [path.read_text() for path in sorted((runs.REPOSITORY / "slurm").glob("*.sh"))]
    outputs = [re.findall("^#SBATCH --output=(.*)$", text, flags=re.M) for text in scripts]
    assert outputs == [["%x-%j.out"], ["%x-%j.out"], ["%x-%A_%a.out"], ["%x-%j.out"]]
    for name in ("cifar_dist-1.out", "cifar_dist-sweep-1_0.out", "cifar_dist-evaluate-1.out", "docs/cifar_dist-1.out",
                 "logs/mine"):  # fmt: skip
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=runs.REPOSITORY, check=False).returncode == 0


@pytest.mark.slow
def test_two_jobs_share_the_nodes(cluster: SlurmCluster, data_dir: Path, tmp_path: Path) -> None:
    """Each with a processor of both nodes: their ports, locks and copies of the data do not collide."""
    part, settings = (*PART, "--nodes=2"), (*SHORT, "--eval.test_subset", "500")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    both = [Submission(cluster, data_dir, folder, part, settings, **ONE_PROCESS) for folder in folders]
    for submission in both:
        submission.wait()
    receipts = [runs.summary(submission.directory)["data_receipt"] for submission in both]
    assert receipts[0] == receipts[1]
    started = [cluster.command("scontrol", "show", "job", submission.job) for submission in both]
    times = [re.findall(r"(?:StartTime|EndTime)=(\S+)", text) for text in started]
    assert times[1][0] < times[0][1], "they ran one after the other"


def test_processes_per_node() -> None:
    none = {"CUDA_VISIBLE_DEVICES": ""}
    assert slurm_job.processes_per_node(none) == min(2, os.cpu_count() or 1)
    assert slurm_job.processes_per_node({**none, "SLURM_NTASKS_PER_NODE": "3"}) == 3
    given = {**none, "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}
    assert slurm_job.processes_per_node(given) == 8
    assert slurm_job.processes_per_node({**given, "SLURM_GPUS_PER_NODE": "a100:4"}) == 4
    assert slurm_job.processes_per_node({**given, "NPROC_PER_NODE": "5"}) == 5
    assert slurm_job.processes_per_node({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert slurm_job.gpus_per_node({"CUDA_VISIBLE_DEVICES": "0, 1"}) == 2
    assert slurm_job.gpus_per_node({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
    assert slurm_job.gpus_per_node({"CUDA_VISIBLE_DEVICES": "GPU-1f,MIG-2a"}) == 2
    with pytest.raises(UserError, match="NPROC_PER_NODE is two"):
        slurm_job.processes_per_node({"NPROC_PER_NODE": "two"})


def test_attempts_that_get_no_further_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node without scontrol, as in a container, where each refusal has its own reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    first = slurm_job.Job({"SLURM_JOB_ID": "7"})
    steps = [None, None, 20, 40, 40, 40]
    for restarts, step in enumerate(steps):
        job = slurm_job.Job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)})
        assert job.requeue(tmp_path, step) == "scontrol is not on this node"
    assert first.requeue(tmp_path, 40) == "3 attempts in a row got no step further; it needs a longer --time"
    assert first.requeue(tmp_path, 41) == "scontrol is not on this node"
    other = slurm_job.Job({"SLURM_JOB_ID": "8"})
    assert other.requeue(tmp_path, 41) == "scontrol is not on this node"
    assert slurm_job.Job({"SLURM_JOB_ID": "8", "MAX_REQUEUES": ""}).max_requeues == 20
    bounded = slurm_job.Job({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"})
    assert "requeued 2 times" in bounded.requeue(tmp_path, 60)
    for wrong in ("-1", "10000", "x"):
        with pytest.raises(UserError, match=f"MAX_REQUEUES is {wrong}; valid: 0 to 9999"):
            slurm_job.Job({"SLURM_JOB_ID": "8", "MAX_REQUEUES": wrong})


def test_ports_of_jobs() -> None:
    assert slurm_job.free_port(5) == 16_384 + 5
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 16_384 + 6))
        taken.listen()
        assert slurm_job.free_port(6) == 16_384 + 6 + 97
    assert slurm_job.free_port(16_384 * 3 + 7) == 16_384 + 7


def test_sweep_of_a_part_of_the_test_set_is_refused_before_it_trains(tmp_path: Path) -> None:
    """Its table would refuse the runs."""
    environment = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "NPROC_PER_NODE": "1"}
    words = [sys.executable, "-m", "cifar_dist.cluster.slurm", "sweep", *SHORT, "--run.dir", str(tmp_path / "sweep")]
    result = subprocess.run(
        [*words, "--eval.test_subset", "500"], env=os.environ | environment | {"SLURM_ARRAY_TASK_COUNT": "3"},
        cwd=runs.REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "eval.test_subset is for trials" in result.stderr
    assert not (tmp_path / "sweep").exists()
