"""launch/sweep as a user runs it. That it resumes what was stopped: test_seeds.py, with launch/seeds, the same code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_dist.cluster import local_sweep
from cifar_dist.errors import UserError
from cifar_dist.sweep import parse
from cifar_dist.training.checkpoint import all_steps
from tests.scripts.test_launch import TINY, start
from tests.support import runs

pytestmark = pytest.mark.run
LINES = ["--optim.lr 0.1", "--optim.lr 0.2"]


def sweep(data_dir: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    places = ("--data.dir", data_dir, "--run.dir", folder)
    arguments = ("quickstart", "--grid", "optim.lr=0.1,0.2", *TINY[2:], *more)
    return start("sweep", *arguments, *places, cpu=runs.ON_ONE_CPU[-1], NPROC_PER_NODE="1")


@pytest.mark.data
def test_every_combination_and_one_table(data_dir: Path, tmp_path: Path) -> None:
    """Repeated, it trains nothing; with other settings it is refused."""
    folder = tmp_path / "my sweep"
    output = runs.finish(sweep(data_dir, folder))
    assert f"sweep: run 2 of 2, seed 0, {LINES[1]}, in {folder}/setting-1/seed-0" in output
    assert len(re.findall(r"^--optim.lr 0.\d +1 +", output, flags=re.M)) == 2

    summaries = [runs.summary(folder / f"setting-{k}/seed-0") for k in (0, 1)]
    assert summaries[0]["model_sha256"] != summaries[1]["model_sha256"]
    assert [(s["steps"], s["test_n"]) for s in summaries] == [(2, 10_000)] * 2
    figures = json.loads((folder / "seeds.json").read_text())["settings"]
    assert list(figures) == LINES
    assert [figures[line]["config"]["optim.lr"] for line in LINES] == [0.1, 0.2]
    assert [figures[line]["test_accuracy"]["mean"] for line in LINES] == [s["test_accuracy"] for s in summaries]
    own = yaml.safe_load((folder / "setting-1/seed-0/config.yaml").read_text())
    assert own["run"]["name"] == "quickstart-sweep-setting-1-seed-0"
    assert (own["track"]["group"], own["track"]["job_type"]) == ("quickstart-sweep", "setting-1")

    again = runs.finish(sweep(data_dir, folder))
    assert [f"sweep: seed 0, {line} is complete" in again for line in LINES] == [True, True]
    assert again.splitlines()[-5:] == output.splitlines()[-5:]
    refused = runs.finish(sweep(data_dir, folder, "--optim.momentum", "0.5"), expected=2)
    assert "optim.momentum: 0.9 and 0.5" in refused


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 75), (signal.SIGTERM, 143)]
)
def test_stop_signals(number: signal.Signals, code: int, data_dir: Path, tmp_path: Path) -> None:
    process = sweep(data_dir, tmp_path, "--train.max_steps", "500", "--train.checkpoint_every_steps", "1")
    while not all_steps(tmp_path / "setting-0/seed-0/checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    assert "sweep: stopped; the same command resumes from here" in runs.finish(process, expected=code)
    assert runs.children_with(str(tmp_path)) == []
    assert json.loads((tmp_path / "setting-0/seed-0/status.json").read_text())["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.data
def test_a_run_that_diverges_stops_no_other(data_dir: Path, tmp_path: Path) -> None:
    """It would diverge again whenever the command is repeated."""
    process = start(
        "sweep", "quickstart", "--grid", "optim.lr=90000,0.1", *TINY[2:], "--train.max_steps", "4", "--optim.name",
        "sgd", "--optim.warmup_share", "0", "--optim.bias_lr_factor", "900", "--train.precision", "fp32", "--data.dir",
        data_dir, "--run.dir", tmp_path / "sweep", cpu=runs.ON_ONE_CPU[-1], NPROC_PER_NODE="1",
    )  # fmt: skip
    output = runs.finish(process, expected=5)
    assert "error: 1 of the 2 runs diverged, so there is no table; the others are complete." in output
    assert f"\n{tmp_path}/sweep/setting-0/seed-0\n" in output
    assert runs.summary(tmp_path / "sweep/setting-1/seed-0")["steps"] == 4


def test_the_id_of_a_wandb_run_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of the sweep would be one at W&B."""
    found = list[dict[str, str]]()

    class Process:
        def __init__(self, _: object, env: dict[str, str], **__: Any) -> None:
            found.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setenv("WANDB_RUN_ID", "one")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(local_sweep, "handled_signals", tuple)
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert local_sweep.Job("seeds").run([], 1) == 0
    assert "WANDB_RUN_ID" not in found[0]
    assert found[0]["WANDB_MODE"] == "offline"


def test_a_checkpoint_to_resume_from_is_refused(tmp_path: Path) -> None:
    """A sweep sets run.resume of each run, so the path would be ignored."""
    (tmp_path / "a.yaml").write_text("run: {resume: runs/x/step-00000005.pt}")
    with pytest.raises(UserError, match=r"a\.yaml sets run\.resume to a path, .* --model\.weights PATH"):
        parse([str(tmp_path / "a.yaml"), "2"])


@pytest.mark.data
def test_a_run_that_fails_ends_the_sweep(data_dir: Path, tmp_path: Path) -> None:
    """With its exit code, before the next run."""
    (tmp_path / "setting-0").mkdir()
    (tmp_path / "setting-0/seed-0").write_text("a file where the run directory goes")
    output = runs.finish(sweep(data_dir, tmp_path), expected=2)
    assert "setting-0/seed-0 ended with exit code 2. Repeat the command" in output
    assert "run 2 of 2" not in output
