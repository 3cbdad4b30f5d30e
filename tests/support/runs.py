"""Start real training processes, as a person would."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cifar_dist
from cifar_dist.data import cifar10
from cifar_dist.data.prepare import beton
from cifar_dist.process import kill_process_tree

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FAULTY = str(REPOSITORY / "tests/support/faulty.py")
# The quickstart network at a quarter of its width, and little to score: most tests are not about the score.
SMALL = (
    "--config", str(REPOSITORY / "configs/quickstart.yaml"), "--model.width", "0.0625", "--data.subset", "1920",
    "--train.batch_size", "96", "--train.micro_batch_size", "16", "--train.max_steps", "20", "--eval.tta", "none",
    "--eval.bn_samples", "500", "--eval.test_subset", "500", "--augment.low_resolution_share", "0",
    "--track.wandb", "disabled",
)  # fmt: skip

# A run of seconds with three checkpoints, which the fixture `short_run` makes with one process.
SHORT = (
    *SMALL, "--train.precision", "fp32", "--train.batch_size", "32", "--train.max_steps", "60",
    "--train.log_every_steps", "4", "--train.checkpoint_every_steps", "20", "--train.keep_checkpoints", "3",
)  # fmt: skip

# What two processes do in the fixture `two_ranks`, long enough to be stopped several times.
TWO_RANKS = (
    *SMALL, "--train.precision", "fp32", "--train.batch_size", "32", "--train.log_every_steps", "4",
    "--train.max_steps", "100", "--train.checkpoint_every_steps", "10", "--run.resume", "auto",
)  # fmt: skip


# Each worker of pytest-xdist has a processor for its single processes, and ports. On processors that others use, too,
# two threads of one process wait for each other a hundred times longer than they compute.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
CPUS = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))]
ON_ONE_CPU = ("taskset", "-c", CPUS[_WORKER % len(CPUS)])


@torch.inference_mode()
def assert_loads_as_evaluated(path: Path, data_dir: Path, which: str | int = "last") -> None:
    """The loaded model classifies the test images as `evaluate` says, in other batches."""
    figures = finish(start(1, path, "--which", str(which), "--data_dir", data_dir, module="evaluate"))
    expected = json.loads(figures[figures.index("{\n") :])["confusion"]
    model = cifar_dist.load(path, which, "cpu")
    images, labels = beton.read_arrays(data_dir / cifar10.TEST)
    found = torch.zeros(10, 10, dtype=torch.int64)
    for part, right in zip(*(torch.split(torch.from_numpy(x), 400) for x in (images, labels)), strict=True):
        answers = model(model.preprocess(part.permute(0, 3, 1, 2))).argmax(1)
        found += torch.bincount(10 * right + answers, minlength=100).view(10, 10)
    # Equal where it was tried. On another processor one of 10,000 answers may hang on the last bit.
    assert int((found - torch.tensor(expected)).abs().sum()) <= 2


def command(world_size: int, module: str = "train") -> list[str]:
    """Plain python on one processor for one process, torchrun on this machine for more."""
    if world_size == 1:
        return [*ON_ONE_CPU, sys.executable, "-m", f"cifar_dist.{module}"]
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(world_size), "-m", f"cifar_dist.{module}"]


def start(
    world_size: int, *arguments: str | Path, module: str = "train", cwd: Path = REPOSITORY
) -> subprocess.Popen[str]:
    return start_command([*command(world_size, module), *map(str, arguments)], cwd)


def start_command(words: list[str], cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=os.environ | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0, timeout_s: float = 240) -> str:
    """Wait for the end and return the output; anything but the `expected` exit code is a failure that shows it."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Or it would slow down all that comes after, which then fails, too.
        kill_process_tree(process.pid)
        raise
    assert process.returncode == expected, output
    return output


def run(world_size: int, *arguments: str | Path, expected: int = 0, module: str = "train") -> str:
    return finish(start(world_size, *arguments, module=module), expected)


def summary(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return values


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, none before it is there."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged_steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in records(run_dir) if "train/loss" in record]


def records_without_times(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs between two runs of one configuration."""
    times = {"seconds", "images_per_second", "data_wait"}
    return [{key: value for key, value in record.items() if key not in times} for record in records(run_dir)]


def assert_same(run_dir: Path, whole: Path, *keys: str) -> None:
    """The run in `run_dir` ended as that in `whole`, by these figures or all that tell, with each line of it once."""
    expected, got = summary(whole), summary(run_dir)
    for key in keys or ("model_sha256", "data_receipt", "test_confusion", "steps"):
        assert got[key] == expected[key], key
    assert logged_steps(run_dir) == logged_steps(whole)
    if not keys:
        assert (run_dir / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    state = torch.load(run_dir / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
    model: dict[str, torch.Tensor] = state["model"]
    return model


def children_with(text: str) -> list[int]:
    """Pids of living processes with `text` among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if text in arguments and state != "Z":
            found.append(int(entry.name))
    return found


def workers_of(launcher: subprocess.Popen[str], run_dir: Path) -> list[int]:
    return sorted(pid for pid in children_with(str(run_dir)) if pid != launcher.pid)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], limit_s: float = 120) -> None:
    """Wait until `condition` holds; `process` must live that long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.03)


# Below those that the kernel hands out by itself.
_ports = itertools.cycle(range(10_000 + 1_000 * _WORKER, 11_000 + 1_000 * _WORKER))


def free_port() -> str:
    """A free port of this machine, another one each time."""
    for port in _ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return str(port)
    raise AssertionError
