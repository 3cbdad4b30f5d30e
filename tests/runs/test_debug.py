"""The single-device debug mode."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]


def test_debug_mode(data_dir: Path, tmp_path: Path) -> None:
    """As it is, but for little to score: one validation, and 500 test images as they are."""
    debug = str(runs.REPOSITORY / "launch/debug")
    command = [*runs.ON_ONE_CPU, debug, "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "a b")]
    little = ["--eval.every_epochs", "0", "--eval.test_subset", "500", "--eval.tta", "none"]
    result = subprocess.run([*command, *little], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    output = result.stdout
    assert re.search(r"images +\(64, 3, 32, 32\) +uint8", output)
    assert re.search(r"normalised +\(64, 3, 32, 32\) ", output)
    assert re.search(r"classifier\.weight +\(10, 256\) +float32 +2,560", output)
    assert re.search(r"381,882 parameters:", output)
    fitted = re.search(r"self-check: one batch of 64 images fitted to ([\d.]+)%", output)
    assert fitted is not None
    assert float(fitted[1]) > 95
    figures = runs.summary(tmp_path / "a b")
    assert (figures["train_n"], figures["world_size"], figures["steps"]) == (512, 1, 16)
    assert (figures["val_n"], figures["test_n"]) == (5000, 500)
    assert not (tmp_path / "a b" / "wandb").exists()


def test_debug_finds_the_operation_that_made_a_nan(data_dir: Path, tmp_path: Path) -> None:
    """Anomaly detection is on, so the backward pass names its operation, in the rank's log too."""
    config = runs.REPOSITORY / "configs/debug.yaml"
    options = ("--config", config, "--data.dir", data_dir, "--run.dir", tmp_path / "run", "--debug.overfit_steps", "0")
    output = runs.run(1, *options, "--optim.lr", "9e5", "--train.precision", "fp32", expected=5)
    message = re.search(
        r"^error: (in step \d+ on rank 0: Function '(\w+Backward\d)' returned nan values.*)", output, re.M
    )
    assert message is not None, output
    # torch's warning shows where in the forward pass that operation was.
    assert f"Error detected in {message[2]}. Traceback of forward call" in output
    assert "Traceback (most recent call last)" not in output
    assert message[1] in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_pdb_works_under_torchrun_with_one_process(data_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "stop.py"
    script.write_text(
        "import sys\n"
        "from cifar_dist.training.trainer import Trainer\n"
        "def stop(self):\n"
        "    breakpoint()\n"
        "Trainer.train = stop\n"
        "from cifar_dist.train import main\n"
        "main()\n"
    )
    command = [
        *runs.ON_ONE_CPU,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        str(script),
    ]
    options = ["--config", "configs/debug.yaml", "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, *options, "--debug.overfit_steps", "0"],
        cwd=runs.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate("p 6 * 7 * self.world.size\nq\n", timeout=120)
    assert "(Pdb) 42" in output
