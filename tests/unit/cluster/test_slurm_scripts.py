"""slurm/ and cifar_dist.cluster.slurm without a Slurm: its variables and programs, --help, another Python."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

from cifar_dist.cluster import slurm_job
from cifar_dist.errors import UserError
from cifar_dist.fault_tolerance import run_lock
from tests.support import runs

SCRIPTS = ("train", "sweep", "evaluate", "container")
MODULE = (sys.executable, "-m", "cifar_dist.cluster.slurm")
JOB = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "", "NPROC_PER_NODE": "1"}
ARRAY = {f"SLURM_ARRAY_{name}": "1" for name in ("JOB_ID", "TASK_ID", "TASK_COUNT")}


def ended(
    *words: str | Path, code: int, cwd: Path = runs.REPOSITORY, env: Mapping[str, str] = JOB, seconds: float = 60
) -> str:
    """The output of a command that ends with `code` and without a traceback."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CIFAR_DIST_PYTHON", "RANK"))
    }
    result = subprocess.run(
        list(map(str, words)), env=inherited | dict(env), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stdout
    assert "Traceback" not in result.stdout
    return result.stdout


@pytest.fixture
def without_slurm(tmp_path: Path) -> dict[str, str]:
    """A PATH with what the scripts need, but no program of Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sed", "uname", "dirname", "tail"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return {**JOB, "PATH": str(folder)}


@pytest.mark.parametrize(
    ("work", "words", "env"),
    [
        ("train", (), {}),
        ("train", (), {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "MASTER_PORT": "7"}),
        ("sweep", (), ARRAY),
        ("evaluate", ("--checkpoint", "x.pt"), {}),
    ],
)
def test_srun_is_missing(
    work: str, words: tuple[str, ...], env: dict[str, str], tmp_path: Path, without_slurm: dict[str, str]
) -> None:
    """scontrol, too, which is asked for the address of the node first; the name does as well."""
    given = words or ("--run.dir", str(tmp_path / "run"))
    output = ended(*MODULE, work, *given, code=2, env={**without_slurm, **env})
    assert f"error: srun cannot be started on {os.uname().nodename}: No such file or directory. Put" in output
    assert "docs/slurm.md" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["srun", "apptainer"])
def test_container_without_a_program(program: str, tmp_path: Path, without_slurm: dict[str, str]) -> None:
    (tmp_path / "cifar_dist.sif").touch()
    for name in {"srun", "apptainer"} - {program}:
        (tmp_path / "bin" / name).symlink_to("/usr/bin/true")
    env = {**without_slurm, "SLURM_JOB_NUM_NODES": "1"}
    output = ended(runs.REPOSITORY / "slurm/container.sh", code=2, cwd=tmp_path, env=env)
    assert f"error: {program} is not in PATH on {os.uname().nodename}." in output


@pytest.mark.parametrize("value", ["x", "-1", "7 7", "1.5", "\u00b2", "\u0663", "0x7", "9" * 5000])
def test_number_that_is_none(value: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_RESTART_COUNT is '.*'; valid: a whole number") as caught:
        slurm_job.Job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("name", "value", "work"),
    [
        ("SLURM_JOB_ID", "7_1", "train"),
        ("SLURM_RESTART_COUNT", "x", "evaluate"),
        ("SLURM_JOB_NUM_NODES", "1-2", "train"),
        ("SLURM_NTASKS_PER_NODE", "2(x2)", "train"),
        ("SLURM_GPUS_ON_NODE", "two", "train"),
        ("SLURM_GPUS_PER_NODE", "a100:", "train"),
        ("SLURM_GPUS_PER_NODE", "a100:x", "evaluate"),
        ("SLURM_GPUS_PER_NODE", "4,", "train"),
        ("SLURM_ARRAY_TASK_ID", "0-2", "sweep"),
        ("SLURM_ARRAY_JOB_ID", "x", "sweep"),
        ("SLURM_ARRAY_TASK_COUNT", "3.0", "sweep"),
    ],
)
def test_malformed_variable(name: str, value: str, work: str, tmp_path: Path) -> None:
    env = {**JOB, **ARRAY, "NPROC_PER_NODE": "", "PATH": str(tmp_path), name: value}
    output = ended(*MODULE, work, code=2, env=env)
    assert f"{name} is '{value}'; valid: " in output
    assert len(output.splitlines()) < 5


def test_empty_variables_count_as_unset() -> None:
    names = ("RESTART_COUNT", "JOB_NUM_NODES", "GPUS_PER_NODE", "GPUS_ON_NODE", "NTASKS_PER_NODE")
    empty = {f"SLURM_{name}": "" for name in names} | {"SLURMD_NODENAME": "", "CUDA_VISIBLE_DEVICES": "0,1"}
    job = slurm_job.Job({**empty, "SLURM_JOB_ID": "7"})
    assert (job.id, job.restarts, job.num_nodes) == (7, 0, 1)
    assert slurm_job.processes_per_node(empty) == 2
    assert slurm_job.first_address(empty)
    with pytest.raises(UserError, match="this script is for Slurm"):
        slurm_job.Job({**empty, "SLURM_JOB_ID": ""})


@pytest.mark.parametrize("name", [f"SLURM_ARRAY_{name}" for name in ("JOB_ID", "TASK_ID", "TASK_COUNT")])
def test_empty_variable_of_an_array(name: str) -> None:
    assert "a sweep is a job array" in ended(*MODULE, "sweep", code=2, env={**JOB, **ARRAY, name: ""})


@pytest.mark.parametrize(
    ("resume", "restarts", "left", "expected"),
    [
        ("never", 0, "nothing", "auto"),
        ("replace", 0, "a run of another job", "replace"),
        ("replace", 1, "a run of another job", "replace"),
        ("replace", 1, "a run of this job", "auto"),
        ("runs/x/step-00000005.pt", 1, "nothing", "runs/x/step-00000005.pt"),
        ("runs/x/step-00000005.pt", 1, "its copy", "auto"),
        ("runs/x/step-00000005.pt", 1, "a run of this job", "auto"),
    ],
)
def test_what_a_requeued_job_resumes_from(resume: str, restarts: int, left: str, expected: str, tmp_path: Path) -> None:
    """From its own run, if an earlier attempt has begun it."""
    srun, run_dir = tmp_path / "srun", tmp_path / "run"
    srun.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/arguments\n')
    srun.chmod(0o755)
    (run_dir / "checkpoints").mkdir(parents=True)
    if left == "its copy":
        (run_dir / "checkpoints/step-00000005.pt").touch()
    elif left != "nothing":
        (run_dir / "status.json").write_text(f'{{"job": "{7 if left == "a run of this job" else 6}"}}')
    env = {**JOB, "SLURM_RESTART_COUNT": str(restarts), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended(*MODULE, "train", "--config", "debug", "--run.resume", resume, "--run.dir", run_dir, code=0, env=env)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    given = [value for name, value in itertools.pairwise(arguments) if name == "--run.resume"]
    assert given[-1] == expected


def test_the_id_of_a_wandb_run_is_not_passed_to_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho "${{WANDB_RUN_ID-none}}" >{tmp_path}/id\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "run").mkdir()
    env = {**JOB, **ARRAY, "WANDB_RUN_ID": "one", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended(*MODULE, "sweep", "--config", "debug", "--run.dir", tmp_path / "run", code=0, env=env)
    assert (tmp_path / "id").read_text() == "none\n"


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [("4", 4), ("a100:4", 4), ("a100", 1), ("h100-80:2", 2), ("a100:3,v100:1", 4), ("a100_1g.5gb:7", 7), ("2080ti", 1)],
)
def test_gpus_that_were_asked_for(asked: str, gpus: int) -> None:
    """By --gpus-per-node, as Slurm passes it on."""
    assert slurm_job.gpus_per_node({"SLURM_GPUS_PER_NODE": asked, "SLURM_GPUS_ON_NODE": "8"}) == gpus


def test_job_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each run in a job, which salloc starts as well as slurm/."""
    for job, restarts, expected in (("", "", (None, 0)), ("7", "", ("7", 0)), ("7", "2", ("7", 2))):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert run_lock.slurm_job() == expected


def test_malformed_variable_in_a_run_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT is 'x'"):
        run_lock.acquire(tmp_path, wait=False, log=print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "x", "1-2"])
def test_rank_of_a_node(value: str) -> None:
    env = {**JOB, "NNODES": "2", "NODE_RANK": "slurm", "MASTER_ADDR": "localhost", "SLURM_NODEID": value}
    output = ended(runs.REPOSITORY / "launch/multinode", code=2, env=env)
    assert f"error: NODE_RANK is slurm, but SLURM_NODEID is '{value}'; valid: a number, which srun sets." in output


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("--config", "none.yaml", "--help")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script(script: str, words: tuple[str, ...], tmp_path: Path, without_slurm: dict[str, str]) -> None:
    """Of a copy elsewhere, which is what Slurm runs, and without .venv or a job."""
    copy = tmp_path / "slurm_script"
    copy.write_bytes((runs.REPOSITORY / f"slurm/{script}.sh").read_bytes())
    env = {"PATH": without_slurm["PATH"], "CIFAR_DIST_PYTHON": "/nowhere"}
    lines = ended("bash", copy, *words, code=0, cwd=tmp_path, env=env).splitlines()
    assert lines[0].startswith("#SBATCH --job-name=cifar_dist")
    assert [line for line in lines if line.startswith("  sbatch ") and f"slurm/{script}.sh " in line]
    assert len(lines) < 40


@pytest.mark.parametrize(
    "words",
    [("--help",), ("-h",), ("train", "--help"), ("sweep", "--grid", "none", "-h"), ("evaluate", "--help"), ("x", "-h")],
)
def test_help_of_the_module(words: tuple[str, ...]) -> None:
    output = ended(*MODULE, *words, code=0, env={})
    assert output.startswith("usage: python -m cifar_dist.cluster.slurm train|sweep|evaluate")


def python_at(path: Path, options: str = "", **variables: str) -> Path:
    """An executable that starts the Python of the tests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = " ".join(f'{name}="{value}"' for name, value in variables.items())
    path.write_text(f'#!/bin/sh\n{given} exec {sys.executable} {options} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("start", ["slurm/train.sh", "slurm/sweep.sh", "slurm/evaluate.sh", "launch/multinode"])
@pytest.mark.parametrize("kind", ["missing", "folder", "not executable", "not in PATH", "link to nothing"])
def test_python_that_cannot_be_run(kind: str, start: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "not executable":
        path.touch()
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "none")
    name = "no-such-python" if kind == "not in PATH" else str(path)
    output = ended(runs.REPOSITORY / start, code=2, env={**JOB, "CIFAR_DIST_PYTHON": name})
    wrong = f"error: CIFAR_DIST_PYTHON is {name}, which is no executable file on {os.uname().nodename}."
    assert output.splitlines()[0] == wrong
    assert len(output.splitlines()) == 2


@pytest.mark.parametrize("script", ["train", "sweep", "evaluate"])
@pytest.mark.parametrize(("package", "why"), [("torch", "none"), ("torch", "broken"), ("yaml", "none")])
def test_python_that_lacks_a_package(package: str, why: str, script: str, tmp_path: Path) -> None:
    """Also one that is there, but whose libraries are not."""
    library = "libcudart.so.12: cannot open shared object file: No such file or directory"
    text = f"ImportError: {library}" if why == "broken" else f"ModuleNotFoundError: No module named '{package}'"
    kind, message = text.split(": ", 1)
    (tmp_path / f"{package}.py").write_text(f"raise {kind}({message!r})\n")
    if package == "yaml":  # found after these
        for name in ("torch", "ffcv", "ffcv/loader"):
            (tmp_path / f"{name}/__init__.py").parent.mkdir()
            (tmp_path / f"{name}/__init__.py").touch()
    python = python_at(tmp_path / "bin/python", PYTHONPATH=f"{tmp_path}:{runs.REPOSITORY}")
    env = {**JOB, "CIFAR_DIST_PYTHON": str(python)}
    lines = ended(runs.REPOSITORY / f"slurm/{script}.sh", code=2, env=env).splitlines()
    assert lines[0].startswith(f"error: CIFAR_DIST_PYTHON is {python}, which cannot import what training needs, on ")
    assert (lines[1], len(lines)) == (text, 4)
    assert lines[3] == f"`{python} -m cifar_dist.doctor` checks this machine."


@pytest.mark.parametrize("kind", ["a path with a space", "relative", "in PATH"])
def test_other_python_is_used(kind: str, tmp_path: Path) -> None:
    """In a folder of a repository without .venv, by one without cifar_dist. For slurm/ see test_slurm.py."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("launch", "slurm", "cifar_dist", "configs"):
        (repository / name).symlink_to(runs.REPOSITORY / name)
    folder = repository / "runs"
    folder.mkdir()
    packages = sysconfig.get_path("purelib")
    python = python_at(tmp_path / "my conda/bin/other-python", "-S", PYTHONPATH=f"$PYTHONPATH:{packages}")
    name = {"relative": os.path.relpath(python, folder), "in PATH": python.name}.get(kind, str(python))
    path = f"{python.parent}:{os.environ['PATH']}"
    env = {**JOB, "CIFAR_DIST_PYTHON": name, "PATH": path, "NNODES": "1", "PYTHONPATH": ""}
    options = ("--config", "../configs/quickstart.yaml", "--train.batch_size", "50")
    output = ended(repository / "launch/multinode", *options, code=2, cwd=folder, env=env)
    assert "Nearest valid choices" in output


def test_there_is_no_python(tmp_path: Path) -> None:
    for name in ("launch", "slurm"):
        (tmp_path / name).symlink_to(runs.REPOSITORY / name)
    for script in ("train", "sweep", "evaluate"):
        output = ended(tmp_path / f"slurm/{script}.sh", code=2, cwd=tmp_path)
        assert output == (
            f"error: {tmp_path}/.venv/bin/python is missing. Run ./launch/setup first, or set CIFAR_DIST_PYTHON to "
            "another Python.\n"
        )
