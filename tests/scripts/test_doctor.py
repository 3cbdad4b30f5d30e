"""`python -m cifar_dist.doctor` on this machine, and on machines on which one thing is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.diagnosis.checks import CHECKS
from tests.support import runs
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.run
SECRET = "5ec7e7" * 6 + "abcd"  # as long as a key of W&B
INSTALL = "rm -r .venv && ./launch/setup" if Path(sys.prefix).name == ".venv" else "-m pip install"
MACHINE = ["unshare", "--mount", "--net", "sh", "-c"]


class Doctor:
    """A finished call of the command."""

    def __init__(self, tmp_path: Path, *arguments: str | Path, enter: Sequence[str] = (), env: Mapping[str, str] = {}):
        file = tmp_path / "doctor.json"
        words = [*enter, sys.executable, "-m", "cifar_dist.doctor", "--json", str(file), *map(str, arguments)]
        whole = os.environ | env
        done = subprocess.run(
            words, cwd=REPOSITORY, env=whole, capture_output=True, text=True, timeout=240, check=False
        )
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr
        assert "Traceback" not in self.output + self.errors
        self.text = file.read_text()
        self.answer: dict[str, Any] = json.loads(self.text)

    def finding(self, name: str) -> dict[str, str]:
        """The worst of the findings of one check; it is printed."""
        found = [check for check in self.answer["checks"] if check["name"] == name]
        worst: dict[str, str] = min(found, key=lambda check: ["problem", "warning", "ok"].index(check["status"]))
        assert worst["found"] in self.output
        assert worst["status"] == "ok" or all(line in self.output for line in worst["advice"].splitlines())
        return worst


def on_another_machine(setup: str) -> list[str]:
    """A command that runs the words after it with other mounts and without network; `setup` changes the mounts."""
    if subprocess.run([*MACHINE, "ip link set lo up"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("NOT TESTED: another machine (unshare needs root)")
    return [*MACHINE, f'{setup} || exit 99; exec "$@"', ""]


@pytest.fixture(scope="module")
def healthy(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Doctor:
    """All checks. sinfo answers as that of a cluster."""
    folder = tmp_path_factory.mktemp("healthy")
    for name in ("sinfo", "sbatch", "srun", "scontrol"):
        (folder / name).write_text("#!/bin/sh\necho 'debug* up, 2 nodes'\n")
        (folder / name).chmod(0o755)
    env = {
        "WANDB_API_KEY": SECRET, "WANDB_MODE": "offline", "TORCH_TOKEN": SECRET, "OMP_NUM_THREADS": "1",
        "HOME": str(folder), "PATH": f"{folder}:{os.environ['PATH']}",
    }  # fmt: skip
    return Doctor(folder, "--data.dir", data_dir, "--run.dir", folder / "new/runs", env=env)


def test_a_machine_that_works(healthy: Doctor) -> None:
    assert healthy.code == 0, healthy.output
    assert len(healthy.output.splitlines()) <= 30
    warned = {check["name"] for check in healthy.answer["checks"] if check["status"] != "ok"}
    assert warned <= {"disk", "limits", "compiler"}, healthy.output  # which a machine of tests may lack
    assert healthy.answer["status"] == ("warning" if warned else "ok")
    assert list(dict.fromkeys(check["name"] for check in healthy.answer["checks"])) == list(CHECKS)
    assert healthy.output.splitlines()[-1].startswith("0 problems; ")
    assert healthy.answer["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "64 images read" in healthy.finding("ffcv")["found"]
    assert "2 processes exchange by gloo: all-reduce of 17 MB" in healthy.finding("processes")["found"]
    assert "verified 192 MB" in healthy.finding("data")["found"]
    assert "partitions: debug* up, 2 nodes" in healthy.finding("slurm")["found"]
    assert "OMP_NUM_THREADS=1" in healthy.finding("variables")["found"]


def test_no_secret_is_told(healthy: Doctor) -> None:
    assert "WANDB_API_KEY" in healthy.finding("variables")["found"]
    assert SECRET not in healthy.output + healthy.errors + healthy.text


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    Doctor(tmp_path, "--only", "disk", "data", "--data.dir", tmp_path / "data", "--run.dir", tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def test_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    doctor = Doctor(tmp_path, "--only", "compiler", env={"PATH": str(tmp_path / "bin")})
    assert doctor.code == 0  # training on CPUs needs none
    assert (found := doctor.finding("compiler"))["status"] == "warning"
    assert "there is no C++ compiler" in found["found"]
    assert "apt-get install g++" in found["advice"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="NOT TESTED: a compiler without headers, as there is none")
def test_a_compiler_without_headers(tmp_path: Path) -> None:
    program = tmp_path / "c++"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} -nostdinc "$@"\n')
    program.chmod(0o755)
    found = Doctor(tmp_path, "--only", "compiler", env={"CXX": str(program)}).finding("compiler")
    assert found["status"] == "warning"
    assert "cannot compile with Python's headers" in found["found"]


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        ("raise ImportError('libturbojpeg.so.0: cannot open shared object file')",
         "FFCV cannot be imported: libturbojpeg.so.0: cannot open shared object file", "apt-get install libopencv-dev"),
        ("raise ModuleNotFoundError(\"No module named 'ffcv._libffcv'\")",
         "FFCV cannot be imported: No module named 'ffcv._libffcv'", INSTALL),
        ("import os; os.abort()", "the check was killed by SIGABRT", "./launch/setup"),
    ],
)  # fmt: skip
def test_ffcv_that_cannot_be_imported(code: str, message: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "ffcv.py").write_text(code)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    doctor = Doctor(tmp_path, "--only", "ffcv", env={"PYTHONPATH": path})
    assert doctor.code == 1
    assert message in (found := doctor.finding("ffcv"))["found"]
    assert advice in found["advice"]


@pytest.mark.data
def test_an_altered_beton(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "train.beton").symlink_to(data_dir / "train.beton")
    content = bytearray((data_dir / "test.beton").read_bytes())
    content[-1000] ^= 1
    (folder / "test.beton").write_bytes(content)
    doctor = Doctor(tmp_path, "--only", "data", "--data.dir", folder)
    assert doctor.code == 1
    found = doctor.finding("data")
    assert f"{folder}/test.beton is not usable: its SHA-256 is " in found["found"]
    assert f"python -m cifar_dist.prepare --data.dir '{folder}' --rebuild True" in found["advice"]


def test_data_that_is_not_there_yet(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path, "--only", "data", "--data.dir", tmp_path)
    assert (doctor.code, doctor.answer["status"]) == (0, "warning")
    assert doctor.finding("data")["advice"] == f"python -m cifar_dist.prepare --data.dir {tmp_path}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=40m", ": 42 MB free, 300 MB are needed"),
        ("size=400m,nr_inodes=1", ": no inode is free"),
        ("size=400m,ro", " cannot be written: Read-only file system"),
    ],
)
def test_a_full_disk(options: str, message: str, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    enter = on_another_machine(f"mount -t tmpfs -o {options} tmpfs {disk}")
    doctor = Doctor(tmp_path, "--only", "disk", "--run.dir", disk / "runs", enter=enter)
    assert doctor.code == 1
    assert f"run folder {disk}{message}" in (found := doctor.finding("disk"))["found"]
    assert "--run.dir names another" in found["advice"]


@pytest.mark.parametrize(
    ("mode", "status"), [("online", "problem"), (None, "warning"), ("", "warning"), ("offline", "ok")]
)
def test_wandb_that_cannot_be_reached(
    mode: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem if it was asked for, a warning if there is a login; offline asks nobody."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    variables = {} if mode is None else {"WANDB_MODE": mode}
    variables |= {
        "WANDB_API_KEY": SECRET, "HOME": str(tmp_path),
        "WANDB_BASE_URL": f"http://user:{SECRET}@127.0.0.1:{runs.free_port()}",
    }  # fmt: skip
    doctor = Doctor(tmp_path, "--only", "wandb", env=variables)
    found = doctor.finding("wandb")
    assert found["status"] == status
    assert doctor.code == (1 if status == "problem" else 0)
    if status != "ok":
        assert found["found"].startswith("127.0.0.1:")
        assert " cannot be reached: [Errno 111] Connection refused" in found["found"]
        assert "WANDB_MODE=offline" in found["advice"]
    assert SECRET not in doctor.output + doctor.errors + doctor.text


def test_processes_that_cannot_reach_each_other(tmp_path: Path) -> None:
    """The loopback interface is down."""
    doctor = Doctor(tmp_path, "--only", "processes", enter=on_another_machine("true"))
    assert doctor.code == 1
    found = doctor.finding("processes")
    assert "2 processes cannot exchange a tensor:" in found["found"]
    assert "cannot connect to itself at 127.0.0.1 or ::1" in found["found"]
    assert "ip link set lo up" in found["advice"]


def test_an_interface_that_is_not_there(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path, "--only", "processes", env={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert doctor.code == 1
    found = doctor.finding("processes")
    assert "nosuch0" in found["found"]
    assert "unset GLOO_SOCKET_IFNAME" in found["advice"]


def test_a_small_shared_memory(tmp_path: Path) -> None:
    """64 MB, as in Docker's containers: a problem with several GPUs."""
    enter = on_another_machine("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    found = Doctor(tmp_path, "--only", "limits", enter=enter).finding("limits")
    assert found["status"] == ("problem" if len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 else "warning")
    assert "/dev/shm has 67 MB" in found["found"]
    assert "--shm-size=1g" in found["advice"]


def test_few_open_files(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path, "--only", "limits", enter=["sh", "-c", 'ulimit -n 200; exec "$@"', ""])
    assert "a process may open 200 files only" in [check["found"] for check in doctor.answer["checks"]]


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has GPUs")
@pytest.mark.parametrize(("visible", "status"), [("0,1", "problem"), ("", "warning")])
def test_gpus_that_torch_does_not_find(visible: str, status: str, tmp_path: Path) -> None:
    """nvidia-smi is a script that prints the version of a driver for two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.10; echo 570.86.10\n")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}
    found = Doctor(tmp_path, "--only", "gpus", env=env).finding("gpus")
    if torch.version.cuda is None:
        assert (found["status"], "built for CPUs, so 2 GPU(s) stay unused" in found["found"]) == ("problem", True)
        return
    assert found["status"] == status
    reason = "torch finds none of 2 GPU(s)" if visible else "CUDA_VISIBLE_DEVICES is '', which hides 2 GPU(s)"
    assert found["found"].startswith(reason)


def test_slurm_that_does_not_answer(tmp_path: Path) -> None:
    for name in ("sinfo", "sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for job, status in ({}, "warning"), ({"SLURM_JOB_ID": "7"}, "problem"):
        found = Doctor(tmp_path, "--only", "slurm", env=env | job).finding("slurm")
        assert (found["status"], found["found"]) == (status, "Unable to contact slurm controller")


def test_slow_variables(tmp_path: Path) -> None:
    found = Doctor(tmp_path, "--only", "variables", env={"CUDA_LAUNCH_BLOCKING": "1"}).finding("variables")
    assert found["status"] == "warning"
    assert found["advice"] == "unset CUDA_LAUNCH_BLOCKING"


def test_a_python_without_packages() -> None:
    words = [sys.executable, "-S", "-m", "cifar_dist.doctor"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "lacks what even this check needs" in done.stderr
    assert "./launch/setup" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("--only", "disks"), "invalid choice"), (("--data.dirr", "x"), "Did you mean --data.dir?"),
])  # fmt: skip
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    output = runs.run(1, *arguments, module="doctor", expected=2)
    assert message in output


@pytest.mark.parametrize("script", ["debug", "node"])
def test_scripts_name_it_once_when_a_start_fails(script: str, tmp_path: Path) -> None:
    """Not rank 0 and the launcher both."""
    subprocess.run([str(REPOSITORY / "launch/setup")], check=True)  # it loads FFCV if it has something to do
    (tmp_path / "ffcv.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open shared object file')")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "NPROC_PER_NODE": "1"}
    words = [str(REPOSITORY / "launch" / script), "--run.dir", str(tmp_path / "run"), "--track.wandb", "disabled"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "libturbojpeg.so.0" in done.stderr
    assert done.stderr.count("cifar_dist.doctor") == 1
    assert done.stderr.splitlines()[-1] == f"`{REPOSITORY}/.venv/bin/python -m cifar_dist.doctor` checks this machine."
