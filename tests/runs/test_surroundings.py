"""Whole runs in surroundings that people have: output that nobody reads, odd names, no home, no name service."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
OPTIONS = (*runs.SMALL[:-2], "--train.max_steps", "6", "--data.subset", "640", "--eval.test_subset", "70",
           "--eval.bn_samples", "100", "--train.log_every_steps", "2")  # fmt: skip
NO_WANDB = ("--track.wandb", "disabled")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make name spaces and change users")
SLOW = pytest.mark.slow


def words(world_size: int, run_dir: Path, data_dir: Path, *options: str) -> list[str]:
    """A run with `world_size` processes as launch/node starts it, in any working directory."""
    launcher = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2", "-m"]
    start = [*runs.ON_ONE_CPU, sys.executable, "-m"] if world_size == 1 else launcher
    return [*start, "cifar_dist.train", *OPTIONS, *options, "--data.dir", str(data_dir), "--run.dir", str(run_dir)]


def complete(run_dir: Path) -> None:
    assert runs.summary(run_dir)["steps"] == 6
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"


def check(command: list[str], run_dir: Path, expected: int = 0, **options: Any) -> str:
    """The output of a run that ends with `expected`; if that is 0 it is complete."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=runs.REPOSITORY, start_new_session=True, **options)  # fmt: skip
    output = runs.finish(process, expected)
    assert "Traceback" not in output
    if expected == 0:
        complete(run_dir)
    return output


# What is not a result never decides whether there are results


@pytest.mark.parametrize(
    ("name", "backend", "mistake", "warning"),
    [
        ("run_${lr}_${seed}", "module://matplotlib_inline.backend_inline", None, False),
        pytest.param(r"$\frac{", "", "matplotlibrc", False, marks=SLOW),
        pytest.param("lr=0.1 漢字 \N{GRINNING FACE}", "no_such_backend", None, False, marks=SLOW),
        ("a", "", "folder", True),
        pytest.param("a", "", "library", True, marks=SLOW),
    ],
)
def test_a_picture_decides_nothing(
    name: str, backend: str, mistake: str | None, warning: bool, data_dir: Path, tmp_path: Path
) -> None:
    """Text that looks like mathematics, a notebook's backend, settings for TeX; and what no picture can come of."""
    environment = os.environ | {"MPLBACKEND": backend, "LC_ALL": "C", "MPLCONFIGDIR": str(tmp_path)}
    run_dir = tmp_path / "run"
    if mistake == "matplotlibrc":
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    elif mistake == "folder":
        (run_dir / "curves.png").mkdir(parents=True)
        (run_dir / "report.html").write_text("of somebody else")
    elif mistake == "library":
        (tmp_path / "matplotlib.py").write_text("raise OSError('libfreetype.so.6: cannot open shared object file')\n")
        environment["PYTHONPATH"] = f"{tmp_path}:{runs.REPOSITORY}"
    output = check(words(1, run_dir, data_dir, *NO_WANDB, "--run.name", name), run_dir, env=environment)
    assert ("warning: curves.png was not written: " in output) == warning
    assert (run_dir / "curves.png").is_file() != warning
    refused = "report.html exists and is no report, so it is not replaced."
    assert (refused in output) == (mistake == "folder")
    assert (run_dir / "report.html").read_text().startswith("of somebody else" if mistake == "folder" else "<!DOCTYPE")
    assert "Warning" not in output


@ROOT
@pytest.mark.parametrize(
    "home", [None, *(pytest.param(text, marks=SLOW) for text in ("/nonexistent", "", "/proc", "/proc/1/fd/3"))]
)
def test_no_home_and_no_name(home: str | None, data_dir: Path) -> None:
    """A user without an entry in /etc/passwd, as in containers, and the default of track.wandb."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(runs.REPOSITORY)}
    environment |= {} if home is None else {"HOME": home}
    # It may read, as the environment may lie in the home folder of root.
    may_read = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *may_read]
    with tempfile.TemporaryDirectory() as folder:  # pytest's folders are for their owner alone
        Path(folder).chmod(0o777)
        run_dir = Path(folder, "run")
        output = check([*user, *words(1, run_dir, data_dir)], run_dir, env=environment | {"TMPDIR": folder})
    assert "W&B offline: `launch/wandb-sync" in output
    assert "W&B failed" not in output
    assert [line for line in output.splitlines() if "server:" in line or "ERROR" in line or "atplotlib" in line] == []


# Output that nobody reads


def test_output_to_a_closed_pipe(data_dir: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(words(2, tmp_path, data_dir, *NO_WANDB), stdout=subprocess.PIPE, cwd=runs.REPOSITORY,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(200) == 0
    complete(tmp_path)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=SLOW)])
def test_closed_descriptors(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    """`>&- 2>&- <&-`: else the next files that are opened get these numbers, and what is printed goes into them."""
    command = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "", *words(world_size, tmp_path, data_dir, *NO_WANDB)]
    check(command, tmp_path)
    step = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert step["step"] == 2


@pytest.mark.slow
def test_a_reader_that_stops(data_dir: Path, tmp_path: Path) -> None:
    """A pager that waits for its user, or a terminal after Ctrl-S."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"." * 4096)
    done = subprocess.run(words(1, tmp_path, data_dir, *NO_WANDB), stdout=writer, stderr=writer, cwd=runs.REPOSITORY,
                          check=False, timeout=200)  # fmt: skip
    os.close(reader)
    assert done.returncode == 0
    complete(tmp_path)


@pytest.mark.slow
def test_output_to_a_full_disk(data_dir: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words(1, tmp_path, data_dir, *NO_WANDB), stdout=full, stderr=subprocess.PIPE, text=True,
                              cwd=runs.REPOSITORY, check=False, timeout=200)  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == "error: <stdout> cannot be written: No space left on device\n"
    complete(tmp_path)


# A terminal that is closed


def on_a_terminal(command: list[str], run_dir: Path) -> tuple[int, int]:
    """Start `command` on a terminal of its own and wait for its first steps: process id, the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(runs.REPOSITORY)
        os.execvp(command[0], command)
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 120
    while not runs.logged_steps(run_dir):
        try:
            os.read(terminal, 10_000)
        except BlockingIOError:
            time.sleep(0.1)
        assert time.monotonic() < deadline
    return pid, terminal


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=SLOW)])
def test_a_closed_terminal_saves(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    options = (*NO_WANDB, "--train.max_steps", "4000")
    pid, terminal = on_a_terminal(words(world_size, tmp_path, data_dir, *options), tmp_path)
    os.close(terminal)  # the system sends SIGHUP, and output fails
    _, code = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(code) == 75
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["status"], found["exit_code"]) == ("stopped", 75)
    assert found["last_checkpoint_step"] >= 2
    assert runs.children_with(str(tmp_path)) == []


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=SLOW)])
def test_nohup_outlives_its_terminal(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "", *words(world_size, tmp_path, data_dir, *NO_WANDB)]
    pid, terminal = on_a_terminal(command, tmp_path)
    os.kill(pid, signal.SIGHUP)
    os.close(terminal)
    _, code = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    complete(tmp_path)


# No name service


def in_namespace(setup: str, command: list[str]) -> list[str]:
    alone = ["unshare", "--uts", "--net", "--mount", "sh", "-c"]
    if subprocess.run([*alone, "ip link set lo up"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("NOT TESTED: a machine without network (unshare or ip does not work here)")
    return [*alone, f'{setup}; exec "$@"', "", *command]


@ROOT
def test_an_unknown_host_name(data_dir: Path, tmp_path: Path) -> None:
    """The name service may take minutes to say that it does not know this host's name."""
    name = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host-xyz; exec "$@"', ""]
    check([*name, *words(2, tmp_path, data_dir, *NO_WANDB)], tmp_path)


@ROOT
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "hosts"),
    [
        ("launcher", "203.0.113.9 here"), ("launcher", "::1 here"),
        ("launcher", ""), ("torchrun", "203.0.113.9 here"), ("torchrun", "127.0.1.1 here"),
    ],
)  # fmt: skip
def test_without_network(program: str, hosts: str, data_dir: Path, tmp_path: Path) -> None:
    """No interface but loopback; this host's name stands for a foreign address, IPv6, Debian's address, or none."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}\n")
    setup = f"hostname here; ip link set lo up; mount --bind {tmp_path}/hosts /etc/hosts"
    command = words(2, tmp_path / "run", data_dir, *NO_WANDB)
    if program == "torchrun":
        # Without --local-addr torchrun itself waits for the name service before it starts a process of this program.
        local = () if hosts.startswith("127.") else ("--local-addr", "127.0.0.1")
        command = [str(runs.BIN / "torchrun"), *local, *command[command.index("--nproc-per-node") :]]
    check(in_namespace(setup, command), tmp_path / "run")


@ROOT
def test_no_loopback(data_dir: Path, tmp_path: Path) -> None:
    output = check(in_namespace(":", words(2, tmp_path, data_dir, *NO_WANDB)), tmp_path, expected=2)
    assert "cannot connect to itself at 127.0.0.1 or ::1" in output
    assert "ip link set lo up" in output


@ROOT
def test_a_name_service_that_does_not_answer(tmp_path: Path) -> None:
    """Of several machines each says within 15 s whom it cannot find, and then that nobody answered."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    silent = "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 53)); time.sleep(60)"
    setup = (
        f"ip link set lo up; mount --bind {tmp_path}/resolv.conf /etc/resolv.conf; "
        f'{sys.executable} -c "{silent}" & sleep 0.5'
    )
    launcher = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--nnodes", "2", "--node-rank", "1"]
    launcher += ["--master-addr", "node-1.example", "--master-port", "29500", "-m", "cifar_dist.train"]
    started = time.monotonic()
    process = subprocess.Popen(in_namespace(setup, launcher), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, cwd=runs.REPOSITORY, start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert time.monotonic() - started < 15
        assert line.startswith("waiting up to 60 s for the name service of ")
        assert line.endswith("to find MASTER_ADDR node-1.example\n")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
