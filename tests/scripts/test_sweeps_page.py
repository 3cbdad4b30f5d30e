"""The examples of docs/sweeps.md, as they stand there, with further settings that make them short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
SHORT = (*runs.SMALL[2:], "--train.max_steps", "4")  # without --config, which the examples give


def block(language: str) -> str:
    page = (runs.REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.M | re.S)
    return str(found)


def called(words: list[str], cwd: Path) -> str:
    path = f"{runs.BIN}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(runs.REPOSITORY), "WANDB_MODE": "offline"}
    process = subprocess.Popen(
        [*runs.ON_ONE_CPU, *words], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    return runs.finish(process)


def test_optuna(data_dir: Path, tmp_path: Path) -> None:
    """Two trials, the second after the first process has ended; the better one by validation is the best."""
    (tmp_path / "study.py").write_text(block("python"))
    for number in (1, 2):
        output = called([sys.executable, "study.py", "1", *SHORT, "--data.dir", str(data_dir)], tmp_path)
        assert f"best of {number} trials: validation accuracy" in output
    folders = [tmp_path / f"runs/study/trial-{number}" for number in (0, 1)]
    scores = [runs.summary(folder)["val_accuracy"] for folder in folders]
    rates = [yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] for folder in folders]
    assert rates[0] != rates[1]
    assert all(0.02 <= rate <= 0.4 for rate in rates)
    assert f"validation accuracy {max(scores):.2%} with {{'optim.lr': {rates[scores.index(max(scores))]}" in output


# What `wandb agent` does with an order of the server, by its own code, without a server.
AGENT = """
import json, os, sys, yaml
from wandb.wandb_agent import Agent
sweep = yaml.safe_load(open("sweep.yaml"))
place = sweep["command"].index("${args}")
agent = Agent(api=None, queue=None)
agent._sweep_command = sweep["command"][:place] + sys.argv[1:] + sweep["command"][place:]
os.environ["WANDB_SWEEP_ID"] = "abcd1234"
chosen = {"optim.lr": 0.123, "optim.label_smoothing": 0.0, "augment.flip": "random"}
assert chosen.keys() == sweep["parameters"].keys()
args = {name: {"value": value} for name, value in chosen.items()}
agent._command_run({"run_id": "run5678", "program": None, "args": args})
sys.exit(agent._run_processes["run5678"].wait())
"""


def test_wandb(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(block("yaml"))
    metric = yaml.safe_load(block("yaml"))["metric"]["name"]
    settings = (*SHORT, "--data.dir", str(data_dir), "--run.dir", "run", "--track.wandb", "offline")
    called([sys.executable, "-c", AGENT, *settings], tmp_path)
    own = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (own["optim"]["lr"], own["optim"]["label_smoothing"], own["augment"]["flip"]) == (0.123, 0.0, "random")
    assert own["data"]["train_on"] == "train"
    assert any(metric in record for record in runs.records(tmp_path / "run"))
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("run/wandb/offline-run-*")] == ["run5678"]
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
