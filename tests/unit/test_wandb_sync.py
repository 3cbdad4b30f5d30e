"""launch/wandb-sync, without a server: what it would upload, and why it does not."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar_dist import wandb_sync
from cifar_dist.errors import UserError
from cifar_dist.fault_tolerance import run_lock
from cifar_dist.tracking.wandb_files import HEADER
from tests.support import runs
from tests.support.tracked import environment, start
from tests.support.wandb_server import KEY, serve


def sync(home: Path, *arguments: str | Path, **login: str) -> tuple[int, str]:
    command = [str(runs.REPOSITORY / "launch/wandb-sync"), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=home, env=environment(home, **login), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In runs/: a run that was resumed, one that still runs, one that is uploaded, one without W&B."""
    path = tmp_path_factory.mktemp("sync")
    (path / "runs").mkdir()
    start(path / "runs/a", "offline", event="error")
    start(path / "runs/a", "offline", start=50)
    for name in ("running", "uploaded"):
        segment = path / f"runs/{name}/wandb/offline-run-20260101_120000-x/run-x.wandb"
        segment.parent.mkdir(parents=True)
        segment.write_bytes(HEADER + b"and more")
    segment.with_name("run-x.wandb.synced").touch()
    (path / "runs/without").mkdir()
    killed = path / "runs/killed/wandb/offline-run-20260101_120000-x/run-x.wandb"  # in its first second: no part
    killed.parent.mkdir(parents=True)
    killed.write_bytes(HEADER)
    return path


def test_dry_run(folder: Path) -> None:
    lock = run_lock.acquire(folder / "runs/running", False, print)
    code, output = sync(folder, "--dry-run")
    assert (code, output.splitlines()) == (0, [
        "runs/a: 2 parts to upload",
        "runs/running: still running; not uploaded, as what follows would be left out",
        "runs/uploaded: uploaded already",
    ])  # fmt: skip
    lock.release()
    for path in ("runs/running", "runs/running/wandb", "runs/running/wandb/offline-run-20260101_120000-x"):
        assert sync(folder, path, "--dry-run") == (0, "runs/running: 1 part to upload\n")


def test_without_a_login(folder: Path) -> None:
    assert sync(folder, "runs/a") == (
        2, "error: W&B: No API key configured. Use `wandb login` to log in. Or set WANDB_API_KEY.\n"
    )  # fmt: skip


def test_without_a_server(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    code, output = sync(folder, "runs/a", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert code == 2
    assert output == (
        f"error: W&B's server {url} does not answer: <urlopen error [Errno 111] Connection refused>. Try where it can "
        "be reached.\n"
    )


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a server that speaks no HTTP, with a name and a password; a login with it."""
    import wandb

    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with server, server.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    threading.Thread(target=answer, daemon=True).start()
    place = f"127.0.0.1:{server.getsockname()[1]}"
    settings = SimpleNamespace(base_url=f"http://me:hunter2@{place}")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setenv("WANDB_SILENT", "true")  # which the function sets
    return place


def test_a_server_with_a_password_that_speaks_no_http(address: str) -> None:
    with pytest.raises(UserError) as caught:
        wandb_sync._check_connection()
    assert str(caught.value) == (
        f"W&B's server http://{address} does not answer: SSH-2.0-OpenSSH_9.2. Try where it can be reached."
    )


def leave_part(run: Path) -> Path:
    part = run / "wandb/offline-run-20260101_120000-x/run-x.wandb"
    part.parent.mkdir(parents=True)
    part.write_bytes(HEADER + b"and more")
    (run / "wandb/latest-run").symlink_to(part.parent.name)
    return part


def test_runs_that_are_links(tmp_path: Path) -> None:
    """Each counts once."""
    runs_folder = tmp_path / "runs"
    part = leave_part(runs_folder / "a")
    leave_part(tmp_path / "elsewhere")
    (runs_folder / "link").symlink_to(tmp_path / "elsewhere")
    (runs_folder / "z").symlink_to(runs_folder)
    linked = runs_folder / "link" / part.relative_to(runs_folder / "a")
    expected = {runs_folder / "a": [part], runs_folder / "link": [linked]}
    assert wandb_sync._segments((runs_folder, runs_folder / "a")) == expected


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_part(tmp_path / "a")
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/b cannot be read: Permission denied\. Name the run"):
        wandb_sync._segments((tmp_path,))


def test_a_damaged_part(tmp_path: Path) -> None:
    segment = tmp_path / "run/wandb/offline-run-20260101_120000-x/run-x.wandb"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(b"nothing of W&B")
    with serve() as server:
        code, output = sync(tmp_path, "run", **server.login)
    assert code == 2
    assert "run: not uploaded: " in output
    assert "Failed to read" in output  # W&B's reason, although W&B is silent
    assert output.endswith("error: 1 of 1 runs were not uploaded; see above. Repeat the command.\n")


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "error: nowhere is no folder."), (".", "error: no run below . has been recorded offline by W&B")],
)
def test_nothing_to_upload(path: str, message: str, tmp_path: Path) -> None:
    code, output = sync(tmp_path, path)
    assert code == 2
    assert output.startswith(message)
