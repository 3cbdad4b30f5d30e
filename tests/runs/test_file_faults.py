"""Faults of disks, files, clocks and W&B in whole runs: what the user sees, and that nothing is lost or left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.training import checkpoint
from tests.runs.test_errors import one_screen
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
OPTIONS = (*runs.SHORT, "--run.resume", "auto")
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that takes one checkpoint of these runs and a half."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a small file system needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)


def fill(path: Path) -> None:
    """Write to it until its file system is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def status(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return values


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_disk_full_while_a_checkpoint_is_written(short_run: Path, data_dir: Path, disk: Path) -> None:
    run_dir = disk / "run"
    options = (*OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    output = runs.run(1, *options, expected=4)
    assert "the checkpoint of step 40 cannot be written" in output
    assert "No space left on device" in output
    assert "Make room, then resume with --run.resume auto" in output
    assert one_screen(output)
    assert checkpoint.all_steps(run_dir / "checkpoints") == [20]
    checkpoint.read_verified(checkpoint.path_of(run_dir / "checkpoints", 20))
    assert temporary_files(disk) == []
    assert (status(run_dir)["status"], status(run_dir)["exit_code"]) == ("failed", 4)

    make_room(disk)
    assert "step-00000020.pt" in runs.run(1, *options)
    runs.assert_same(run_dir, short_run)


@pytest.mark.slow
def test_disk_full_for_the_metrics(data_dir: Path, disk: Path) -> None:
    """Two ranks, of which one writes: the message is printed once, and the last checkpoint is kept."""
    run_dir = disk / "run"
    make_room(disk)
    # Some 20 lines may still fit into the last page; the metrics fail before the next checkpoint does.
    options = (*OPTIONS, "--train.max_steps", "8000", "--train.log_every_steps", "1",
               "--train.checkpoint_every_steps", "60", "--data.dir", data_dir)  # fmt: skip
    words = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["cifar_dist.train", *map(str, options), "--run.dir", str(run_dir)]
    process = runs.start_command(words)
    runs.wait_until(lambda: checkpoint.all_steps(run_dir / "checkpoints"), process)
    fill(disk / "filler")
    output = runs.finish(process, expected=2)
    assert output.count("error: ") == 1
    assert "cannot write the metrics" in output
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert runs.children_with(str(run_dir)) == []
    saved = checkpoint.all_steps(run_dir / "checkpoints")[-1]

    (disk / "filler").unlink()
    process = runs.start_command(words)
    runs.wait_until(lambda: checkpoint.all_steps(run_dir / "checkpoints")[-1] > saved, process)
    process.terminate()
    assert f"step-{saved:08d}.pt" in runs.finish(process, expected=75)
    steps = runs.logged_steps(run_dir)
    assert steps == list(range(1, len(steps) + 1))


def write_with_digest(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")


def test_damaged_and_foreign_checkpoints_are_passed_over(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """The newest is cut off, the one before is whole, but of another model."""
    run_dir = tmp_path / "run"
    shutil.copytree(short_run, run_dir)
    (run_dir / "summary.json").unlink()
    newest, foreign, good = (checkpoint.path_of(run_dir / "checkpoints", step) for step in (60, 40, 20))
    os.truncate(newest, newest.stat().st_size - 1000)
    state = torch.load(foreign, weights_only=True)
    state["config"] = state["config"].replace("width: 0.0625", "width: 0.125")
    torch.save(state, foreign)
    data = foreign.read_bytes()
    write_with_digest(foreign, data)
    output = runs.run(1, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    assert f"warning: skipped, and renamed to {newest.name}.skipped: {newest} is damaged" in output
    assert f"warning: skipped, and renamed to {foreign.name}.skipped: {foreign} is of a run with other" in output
    assert "model.width was 0.125, is now 0.0625\nresuming from" in output
    assert f"resuming from {good}" in output
    runs.assert_same(run_dir, short_run)
    assert foreign.with_name(foreign.name + ".skipped").read_bytes() == data


@pytest.mark.parametrize("link", [False, True])
def test_a_run_without_its_checkpoints_is_left_alone(
    link: bool, short_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(short_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    if link:
        (run_dir / "checkpoints").symlink_to(tmp_path / "gone")
        (run_dir / "summary.json").unlink()
        (run_dir / "status.json").write_text('{"last_checkpoint_step": null}')
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    output = runs.run(1, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir, "--optim.lr", "0.3", expected=2)
    message = f"the run directory {run_dir} cannot be written: File exists" if link else "has no checkpoint any more"
    assert message in output
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_was_killed_while_it_wrote_its_results_writes_them(
    short_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    """summary.json is written first, then the others."""
    run_dir, names = tmp_path / "run", ("predictions.csv", "report.html")
    shutil.copytree(short_run, run_dir)
    for name in names:
        (run_dir / name).unlink()
    runs.run(1, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    assert (run_dir / names[0]).read_bytes() == (short_run / names[0]).read_bytes()
    assert (run_dir / names[1]).exists()
    runs.assert_same(run_dir, short_run)
    again = runs.run(1, *OPTIONS, "--data.dir", data_dir, "--run.dir", run_dir)
    assert "this run is complete" in again


def test_checkpoints_with_false_contents_are_refused(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """With a right digest and the settings of this run, and no older checkpoint to resume from."""
    good = torch.load(checkpoint.path_of(short_run / "checkpoints", 20), weights_only=True)
    path_of = {wrong: checkpoint.path_of(tmp_path / wrong / "checkpoints", 20) for wrong in ("shapes", "step", "keys")}
    processes = {}
    for wrong, path in path_of.items():
        state = {**good, "model": dict(good["model"])}
        if wrong == "shapes":
            state["model"]["classifier.weight"] = torch.zeros(10, 7)
        elif wrong == "step":
            state["step"] = 40
        else:
            del state["optimizer"], state["receipt"]
        path.parent.mkdir(parents=True)
        torch.save(state, path)
        write_with_digest(path, path.read_bytes())
        processes[wrong] = runs.start(1, *OPTIONS, "--data.dir", data_dir, "--run.dir", tmp_path / wrong)
    said = {
        "shapes": "{} holds another model: size mismatch for classifier.weight",
        "step": "{} holds step 40",
        "keys": "{} is incomplete: it has no optimizer, receipt.",
    }
    for wrong, process in processes.items():
        path = path_of[wrong]
        output = runs.finish(process, expected=4)
        assert said[wrong].format(path) in output
        assert one_screen(output)
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.with_name(f"{path.name}.sha256").read_text()


def test_read_only_run_directory(short_run: Path, data_dir: Path) -> None:
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" || exit 99; exec "$@"'
    enter = ["unshare", "--mount", "sh", "-c", mount, str(short_run)]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a read-only file system, as this user may not mount one")
    words = [*enter, *runs.command(1), *OPTIONS, "--data.dir", str(data_dir), "--run.dir", str(short_run)]
    output = runs.finish(runs.start_command(words), expected=2)
    assert f"the run directory {short_run} cannot be written: Read-only file system" in output
    assert "Choose another --run.dir" in output
    assert one_screen(output)


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME, reason="NOT TESTED: clocks that are set back, as Debian's libfaketime is missing")
def test_clock_set_back(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day during a run, and by another one before it resumes. Few steps, as libfaketime makes them take a second.

    It also fakes the waits of Python's threads for each other.
    """
    run_dir, clock = tmp_path / "run", tmp_path / "clock"
    clock.write_text("+0\n")
    # What is faked is the clock that can be set, asked anew each time; file times and monotonic clocks stay.
    for name, value in {
        "LD_PRELOAD": str(FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    options = (*OPTIONS, "--train.max_steps", "12", "--train.log_every_steps", "1", "--data.dir", data_dir,
               "--run.dir", run_dir)  # fmt: skip
    process = runs.start(1, *options)
    runs.wait_until(lambda: runs.logged_steps(run_dir), process)
    clock.write_text("-1d\n")
    runs.wait_until(lambda: runs.logged_steps(run_dir)[-1] >= 4, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, expected=75)
    first_step = checkpoint.all_steps(run_dir / "checkpoints")[-1]
    clock.write_text("-2d\n")
    began = time.monotonic()
    output = runs.run(1, *options)
    took = time.monotonic() - began
    assert f"resuming from {checkpoint.path_of(run_dir / 'checkpoints', first_step)}" in output
    log = (run_dir / "logs/rank-0.log").read_text().splitlines()
    days = {line[:10] for line in log if line[:4].isdecimal()}
    assert len(days) >= 3  # so it was set back
    assert runs.logged_steps(run_dir) == list(range(1, 13))
    figures, records = runs.summary(run_dir), [r for r in runs.records(run_dir) if "seconds" in r]
    assert 0 < figures["first_step_seconds"] < took
    assert 0 < figures["train_seconds"] < 600
    assert figures["images_per_second"] == pytest.approx(12 * 32 / figures["train_seconds"])
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert all(record["images_per_second"] > 0 for record in records)


def processes_of(home: Path) -> list[int]:
    """Pids of living processes that were given this HOME."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={home}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("login", ["none", pytest.param("dead", marks=pytest.mark.slow)])
def test_wandb_online_that_fails(login: str, data_dir: Path, tmp_path: Path) -> None:
    """Two ranks each: without a login, and with a login for a server that does not answer, which takes 20 s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k not in ("NETRC", "HOME")}
    more = {"WANDB_BASE_URL": dead}
    if login == "dead":
        more["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"
    words = [sys.executable, "-m", "cifar_dist.cluster.launcher", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["cifar_dist.train", *OPTIONS, "--track.wandb", "online", "--data.dir", str(data_dir), "--run.dir"]
    process = subprocess.Popen(
        [*words, str(tmp_path / "run")], env={**kept, "HOME": str(tmp_path), **more}, cwd=runs.REPOSITORY,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    output = runs.finish(process, expected=2, timeout_s=120)
    assert output.count("error: ") == 1
    assert one_screen(output)
    assert status(tmp_path / "run")["exit_code"] == 2
    assert processes_of(tmp_path) == []
    assert temporary_files(tmp_path / "run") == []
    assert "W&B online was asked for and failed" in output
    assert ("No API key configured. Use `wandb login` to log in." in output) == (login == "none")
    assert "--track.wandb offline or disabled" in output
