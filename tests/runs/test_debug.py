"""The single-device debug mode."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
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
    parameters = output[output.index("381,882 parameters:") :].split("\n  ")[1:]
    assert re.search(r"^blocks\.3a +18 tensors +float32 +[\d,]+  cpu  from -\d.* to \d", "\n".join(parameters), re.M)
    assert re.search(r"^classifier\.weight +\(10, 256\) +float32 +2,560", "\n".join(parameters), re.M)
    assert len(parameters) <= 30
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


STOP = """
import sys
from cifar_dist.training.{module} import {cls}
good = {cls}.{method}
def stop(self, *arguments):
    breakpoint()
    return good(self, *arguments)
{cls}.{method} = stop
from cifar_dist.train import main, run_and_exit
run_and_exit(main, needs_output=False)
"""
QUICK = ("--config", "configs/debug.yaml", "--debug.overfit_steps", "0")


def in_pdb(words: list[str], typed: str, code: int) -> str:
    """The output of a run in which `typed` is typed into a debugger on a terminal; ctrl-D is \\x04."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*runs.ON_ONE_CPU, *words], cwd=runs.REPOSITORY, stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    output = b""
    with suppress(OSError):  # the end of the last process that has the terminal
        while part := os.read(terminal, 4096):
            output += part
            if output.endswith(b"(Pdb) ") and typed:
                line, _, typed = typed.partition("\n")
                os.write(terminal, line.encode() + (b"\n" if line != "\x04" else b""))
    os.close(terminal)
    assert process.wait(60) == code, output.decode()
    return output.decode()


@pytest.mark.parametrize(
    ("cls", "typed", "shown"),
    [
        (("trainer", "Trainer", "train"), "p 6 * 7 * self.world.size\nq\n", "(Pdb) p 6 * 7 * self.world.size\r\n42"),
        (("train_step", "TrainStep", "_backward"), "up\n\x04", "(Pdb) "),
    ],
    ids=["q before the first step", "ctrl-D in a step"],
)
def test_pdb_ends_without_a_traceback(
    cls: tuple[str, str, str], typed: str, shown: str, data_dir: Path, tmp_path: Path
) -> None:
    script, run_dir = tmp_path / "stop.py", tmp_path / "run"
    script.write_text(STOP.format(module=cls[0], cls=cls[1], method=cls[2]))
    words = [sys.executable, str(script), *QUICK, "--data.dir", str(data_dir), "--run.dir", str(run_dir)]
    output = in_pdb(words, typed, code=130)
    assert shown in output
    assert output.rstrip().endswith("ended in the debugger")
    assert "Traceback" not in output
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 130)
    assert "BdbQuit" in (run_dir / "logs/rank-0.log").read_text()


def test_q_in_an_own_network(data_dir: Path, tmp_path: Path) -> None:
    """Which is called while it is made, where other errors are explained."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, settings, num_classes):\n"
        "        super().__init__()\n"
        "        self.end = nn.Linear(3072, num_classes)\n"
        "    def forward(self, images):\n"
        "        breakpoint()\n"
        "        return self.end(images.flatten(1))\n"
    )
    words = ["env", f"PYTHONPATH={tmp_path}:{runs.REPOSITORY}", sys.executable, "-m", "cifar_dist.train", *QUICK]
    options = ["--model.name", "own:Mine", "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]
    output = in_pdb([*words, *options], "p images.shape\nq\n", code=130)
    assert "torch.Size" in output
    assert "Traceback" not in output
    assert "failed" not in output


def test_pdb_works_under_torchrun_with_one_process(data_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "stop.py"
    script.write_text(STOP.format(module="trainer", cls="Trainer", method="train"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    options = [*QUICK, "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]
    assert "(Pdb) p 41 + self.world.size\r\n42" in in_pdb(
        [*torchrun, str(script), *options], "p 41 + self.world.size\nq\n", 1
    )


def test_a_debug_run_replaces_the_last_one(data_dir: Path, tmp_path: Path) -> None:
    """In runs/debug of the working directory, without a question; a run of another kind is refused."""
    few = ("--train.max_steps", "4", "--eval.test_subset", "500", "--eval.tta", "none", "--eval.bn_samples", "100")
    options = (
        "--config",
        "debug",
        "--debug.overfit_steps",
        "0",
        "--data.dir",
        data_dir,
        "--model.width",
        "0.0625",
        *few,
    )
    command = [*runs.command(1), *map(str, options)]
    folder, again = tmp_path / "runs/debug", [*command, "--train.max_steps", "2", "--run.seed", "1"]
    runs.finish(runs.start_command(command, tmp_path))
    (folder / "notes.txt").write_text("mine")
    runs.finish(runs.start_command(again, tmp_path))
    assert [path.name for path in folder.parent.iterdir()] == ["debug"]
    assert [path.name for path in (folder / "checkpoints").glob("*.pt")] == ["step-00000002.pt"]
    assert runs.logged_steps(folder) == [2]
    assert (runs.summary(folder)["seed"], (folder / "notes.txt").read_text()) == (1, "mine")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("resume: replace", "resume: auto"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = "runs/debug already holds a run, whose config.yaml does not say run.resume replace"
    assert message in runs.finish(runs.start_command(again, tmp_path), expected=2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
