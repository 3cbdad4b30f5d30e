"""The tracker with real files, a real terminal and W&B's real process."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError
from cifar_dist.tracking import wandb_run
from cifar_dist.tracking.console import describe
from cifar_dist.tracking.metrics_file import read_records
from cifar_dist.tracking.tracker import Tracker
from tests.support.tracked import SECRET_KEY, SECRETS, command, environment, start, strict_lines

OFF = TrackConfig(wandb="disabled")


def test_records_are_strict_json(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Tracker(tmp_path / "run", OFF, {}, "name", 100, 0) as tracker:
        tracker.log_metrics(20, {"train/loss": 1.25, "lr": 0.1, "note": 'a "quoted" ü', "val/loss": None, "val/n": 7})
        assert strict_lines(tmp_path / "run") == [
            {"step": 20, "train/loss": 1.25, "lr": 0.1, "note": 'a "quoted" ü', "val/loss": None, "val/n": 7}
        ]  # already there before anything is closed
        tracker.log_metrics(40, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})
        tracker.finish({}, tmp_path / "run")
    assert strict_lines(tmp_path / "run")[1] == {"step": 40, "a": "nan", "b": "inf", "c": "-inf"}


def test_resume_cuts_later_and_torn_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, OFF, {}, "name", 100, 0) as tracker:
        for step in (20, 40, 60, 60, 80):
            tracker.log_metrics(step, {"train/loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "train/lo')
    capsys.readouterr()
    with Tracker(tmp_path, OFF, {}, "name", 100, 60) as tracker:
        assert "dropped 2 lines from step 60 on" in capsys.readouterr().out
        tracker.log_metrics(80, {"train/loss": 0.5})
    records = strict_lines(tmp_path)
    assert [record["step"] for record in records] == [20, 40, 60, 60, 80]
    assert [record["train/loss"] for record in records] == [1 / 20, 1 / 40, 1 / 60, 1 / 60, 0.5]
    with Tracker(tmp_path, OFF, {}, "name", 100, 0):
        assert strict_lines(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("due", [True, False])
def test_resume_writes_a_postponed_validation_once(due: bool, tmp_path: Path) -> None:
    """The run was killed after it had logged that validation, before it had saved that it was done."""
    lines = [(20, "train"), (20, "val"), (40, "train"), (40, "val")]
    with Tracker(tmp_path, OFF, {}, "name", 100, 0) as tracker:
        for step, name in lines:
            tracker.log_metrics(step, {f"{name}/n": 7})
    with Tracker(tmp_path, OFF, {}, "name", 100, 40, validation_due=due):
        kept = lines[:-1] if due else lines
        assert strict_lines(tmp_path) == [{"step": step, f"{name}/n": 7} for step, name in kept]


def test_a_complete_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "lr": 0.1}\n')
    before = path.stat().st_ino
    with Tracker(tmp_path, OFF, {}, "name", 100, 20):
        pass
    assert path.stat().st_ino == before
    assert read_records(path) == [{"step": 20, "lr": 0.1}]


def test_kill_loses_no_line_and_resume_writes_none_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, "disabled", event="killed").returncode == -signal.SIGKILL
    assert [record["step"] for record in strict_lines(run)] == [20, 40, 60, 60]
    result = start(run, "disabled", start=50)  # the last checkpoint was older than the last line
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in strict_lines(run)] == [20, 40, 60, 60, 80, 100, 100]
    assert "wandb loaded: False" in result.stdout
    assert sorted(file.name for file in run.iterdir()) == ["metrics.jsonl"]


def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"cannot write the metrics .*metrics\.jsonl: No space left on device"),
        Tracker(tmp_path, OFF, {}, "name", 100, 0) as tracker,
    ):
        tracker.log_metrics(20, {"train/loss": 1.0})


def test_plain_lines(tmp_path: Path) -> None:
    result = start(tmp_path / "run", "disabled", event="slow")
    lines = result.stdout.splitlines()
    assert "%|" not in result.stderr
    assert lines[0].startswith("step 20/100  epoch 0.50  loss 1.412  accuracy 61.2 %  lr 0.143  512 images/s  00:0")
    assert lines[0].endswith(" left")
    assert lines[3] == "step 60/100  epoch 1.50  validation loss 0.900  validation accuracy 70.00 %  n 5000"
    assert lines[5] == "step 100/100  epoch 2.50  loss 1.412  accuracy 61.2 %  lr 0.143  512 images/s"
    assert lines[6] == "step 100/100  test accuracy 94.00 %  with test-time augmentation 94.50 %  n 10000"


def test_words() -> None:
    assert describe({"train/loss": "nan", "lr": 1e-05, "val/loss": None, "other": 3}) == ["loss nan", "lr 1e-05"]


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        command(tmp_path / "run", "disabled", event="slow"), env=environment(tmp_path),
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:
        pass  # Linux's way of saying that the other end is closed
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0
    text = output.decode()
    shown = r"epoch \d\.\d\d  loss 1.412  accuracy 61.2 %  lr 0.143  512 images/s"
    assert re.search(rf"\r 60%\|█*.? *\| 60/100, 00:0\d left  {shown}", text)
    assert re.search(rf"\r100%\|█*\| 100/100, {shown}", text)
    assert re.search(r"\rfinal test, batches +\d\d%\|█+.? *\| [1-3]/4\b", text)
    assert re.search(r"\rfinal test, batches 100%\|█+\| 4/4", text)
    assert all(len(line) <= 100 for line in re.split(r"[\r\n]+", text))
    lines = text.replace("\r\n", "\n").split("\n")
    validation = "step 60/100  epoch 1.50  validation loss 0.900  validation accuracy 70.00 %  n 5000"
    assert [line.rpartition("\r")[2] for line in lines].count(validation) == 1
    assert "step 20/100" not in text  # training metrics are in the bar, not in lines


def test_wandb_offline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = start(run, "offline", env=SECRETS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"W&B offline: `launch/wandb-sync {run}` uploads it\n")
    assert result.stderr == ""
    run_id = (run / "wandb_id.txt").read_text().strip()
    result = start(run, "offline", start=50, event="error", env=SECRETS)
    assert (run / "wandb_id.txt").read_text().strip() == run_id
    assert "KeyError: 'step 60'" in result.stderr
    logs = sorted(path for path in run.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in logs] == [f"run-{run_id}.wandb"] * 2
    for key in (b"train/loss", b"val/accuracy", b"images_per_second", b"step", b"optim"):
        assert key in logs[0].read_bytes()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_wandb_process_dies(tmp_path: Path) -> None:
    """One line, and nothing else changes, even if W&B was asked for."""
    result = start(tmp_path / "run", "offline", event="wandb dies")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("warning: W&B failed at step 80 (") == 1
    assert [record["step"] for record in strict_lines(tmp_path / "run")] == [20, 40, 60, 60, 80, 100, 100]


def test_wandb_online_without_login(tmp_path: Path) -> None:
    online = start(tmp_path / "run", "online")
    assert online.returncode == 2
    assert "W&B online was asked for and failed: No API key configured. Use `wandb login` to log in." in online.stderr
    assert "To go without: --track.wandb offline or disabled." in online.stderr
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "wandb_id.txt"]


def test_wandb_dead_server(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    login = {"WANDB_BASE_URL": url, "WANDB_API_KEY": SECRET_KEY, "TEST_INIT_TIMEOUT_S": "3"}
    (tmp_path / "home").mkdir()
    (tmp_path / "a").mkdir()
    named = subprocess.Popen(  # beside the other one: each waits for the same time-out
        command(tmp_path / "a", "online"), env=environment(tmp_path / "home", **login),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.monotonic()
    auto = start(tmp_path / "b", "auto", env=login)
    assert time.monotonic() - began < wandb_run.INIT_TIMEOUT_S  # so it is the time-out that decides; W&B's own is 90 s
    assert auto.returncode == 0, auto.stderr
    assert re.search(r"W&B failed, so it works offline now: .*connection refused", auto.stdout)
    assert len(list(tmp_path.glob("b/wandb/offline-run-*/*.wandb"))) == 1
    assert len(strict_lines(tmp_path / "b")) == 7
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET_KEY in path.read_text("latin-1")]
    _, message = named.communicate(timeout=40)
    assert named.returncode == 2
    assert "W&B online was asked for and failed" in message
    assert "--track.wandb offline or disabled" in message


def test_wandb_bad_key(tmp_path: Path) -> None:
    login = {"WANDB_API_KEY": "too-short", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    auto = start(tmp_path / "run", "auto", env=login)
    assert auto.returncode == 0, auto.stderr
    assert "W&B failed, so it works offline now: WANDB_API_KEY invalid" in auto.stdout


def test_wandb_id_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "wandb_id.txt").write_text("not/an id\n")
    with pytest.raises(UserError, match=r"wandb_id\.txt holds no W&B run id"):
        Tracker(tmp_path, TrackConfig(wandb="offline"), {}, "name", 100, 0)


# For each set of environment variables: the mode without --track.wandb and WANDB_MODE.
STORED_MODES = """
import json, os, sys
import wandb
from cifar_dist.tracking.wandb_run import stored_mode

for case in json.loads(sys.argv[1]):
    os.environ.update(case)
    wandb.setup()
    print(stored_mode())
    wandb.teardown()
    for name in case:
        del os.environ[name]
"""


def test_mode_without_options(tmp_path: Path) -> None:
    """Files stand for `wandb login`, `wandb offline` and `wandb disabled`; WANDB_CONFIG_DIR and NETRC name them."""
    for mode in ("online", "offline", "disabled"):
        (tmp_path / mode).mkdir()
        (tmp_path / mode / "settings").write_text(f"[default]\nmode = {mode}\nbase_url = https://wandb.example.org\n")
    for host in ("wandb.example.org", "api.wandb.ai"):
        (tmp_path / host).write_text(f"machine {host} login user password {SECRET_KEY}\n")
        (tmp_path / host).chmod(0o600)
    (tmp_path / "damaged").write_text("machine machine machine\n")
    (tmp_path / "folder").mkdir()
    own = {"NETRC": str(tmp_path / "wandb.example.org")}
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "offline"),
        ({"WANDB_API_KEY": SECRET_KEY}, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": str(tmp_path / "token")}, "online"),
        ({"NETRC": str(tmp_path / "api.wandb.ai")}, "online"),
        (own, "offline"),
        (own | {"WANDB_BASE_URL": "https://wandb.example.org"}, "online"),
        (own | {"WANDB_CONFIG_DIR": str(tmp_path / "online")}, "online"),
        (own | {"WANDB_CONFIG_DIR": str(tmp_path / "offline")}, "offline"),
        (own | {"WANDB_CONFIG_DIR": str(tmp_path / "disabled")}, "disabled"),
        ({"NETRC": str(tmp_path / "damaged")}, "offline"),
        ({"NETRC": str(tmp_path / "folder")}, "offline"),
    ]
    result = subprocess.run(
        [sys.executable, "-c", STORED_MODES, json.dumps([variables for variables, _ in cases])],
        env=environment(tmp_path, WANDB_SILENT="true"), capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert result.stderr == ""
    assert result.stdout.split() == [mode for _, mode in cases]


def test_mode_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(UserError, match=r"WANDB_MODE is 'on'; valid: online, run, offline"):
        Tracker(tmp_path, TrackConfig(), {}, "name", 100, 0)
    result = start(tmp_path / "run", "auto", env={"WANDB_MODE": "disabled"})
    assert "wandb loaded: False" in result.stdout
    result = start(tmp_path / "other", "auto", env={"WANDB_MODE": "", "WANDB_RUN_GROUP": ""})
    assert "W&B offline" in result.stdout, result.stdout


def test_after_wandb_disabled(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    result = start(tmp_path / "run", "auto", env={"WANDB_CONFIG_DIR": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, "")
    assert "W&B" not in result.stdout
    assert len(strict_lines(tmp_path / "run")) == 7
