"""A process that logs as a run does, to W&B and TensorBoard as they are, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cifar_dist.tracking.metrics_file import Record

SECRET_KEY = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {"WANDB_API_KEY": SECRET_KEY, "MY_TOKEN": "secret-in-my-token", "SLURM_JWT": "secret-in-slurm-jwt"}

# run directory, W&B mode, start step, what happens at step 60; TEST_TRACK has further settings
RUN = """
import json, os, resource, signal, subprocess, sys, time
sys.path.insert(0, os.environ.get("TEST_PATH", "."))
from pathlib import Path
from cifar_dist.config import TrackConfig
from cifar_dist.errors import NonFiniteError, StopError, exit_on_error
from cifar_dist.tracking import wandb_run
from cifar_dist.tracking.tracker import Tracker

wandb_run.INIT_TIMEOUT_S = float(os.environ.get("TEST_INIT_TIMEOUT_S", wandb_run.INIT_TIMEOUT_S))
directory, mode, start, event = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
track, run_config = TrackConfig(wandb=mode, **json.loads(os.environ.get("TEST_TRACK", "{}"))), {"optim": {"lr": 0.05}}
results = {"command": "python -m secret", "steps": 100, "test_accuracy": 0.94, "model_sha256": "abcd", "seed": 3}
results |= {"data_receipt": ["first", "last"], "test_confusion": [[10 * i + j for j in range(10)] for i in range(10)]}
with exit_on_error(), Tracker(directory, track, run_config, "test", 100, start) as tracker:
    for step in range(start + 1, 101):
        tracker.progress(step)
        if step % 20 == 0:
            tracker.log_metrics(step, {
                "epoch": step / 40, "train/loss": 1.412, "train/accuracy": 0.612, "lr": 0.143,
                "images_per_second": 512.4, "seconds": 0.1 * step,
            })
        if step == 60:
            tracker.log_metrics(step, {"epoch": 1.5, "val/loss": 0.9, "val/accuracy": 0.7, "val/n": 5000})
            if event == "killed":
                time.sleep(float(os.environ.get("TEST_WAIT_S", "0")))
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "wandb dies":
                subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "wandb-core"], check=True)
                time.sleep(0.5)
            if event == "full disk":  # no file may grow beyond this size
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            if event == "deleted folder":
                (directory / "tensorboard").rename(directory / "gone")
            if event == "not finite":
                raise NonFiniteError("the loss became infinite or NaN in step 60")
            if event == "preempted":
                raise StopError("stopped by SIGUSR1 after step 60. The same command with --run.resume auto resumes it.")
            if event == "error":
                raise KeyError("step 60")
            if event == "slow":
                time.sleep(0.5)
    for batch in range(1, 5):
        tracker.show_test(batch, 4)
        if event == "slow":
            time.sleep(0.3)
    tracker.log_metrics(100, {"test/accuracy": 0.94, "test/accuracy_tta": 0.945, "test/n": 10000})
    tracker.finish(results, directory)
print("wandb loaded:", "wandb" in sys.modules)
"""  # fmt: skip


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's, without any W&B login."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k not in ("NETRC", "HOME")}
    return {**kept, "HOME": str(home), **more}


def command(directory: Path, mode: str, start: int = 0, event: str = "") -> list[str]:
    return [sys.executable, "-c", RUN, str(directory), mode, str(start), event]


def start(
    directory: Path, mode: str, start: int = 0, event: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    home = directory.parent / "home"
    home.mkdir(parents=True, exist_ok=True)
    directory.mkdir(exist_ok=True)
    return subprocess.run(
        command(directory, mode, start, event), env=environment(home, **(env or {})),
        capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip


def strict_lines(directory: Path) -> list[Record]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no strict JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
