"""Own code that fails in a run of two processes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
HOOKS = """
from cifar_dist.training.trainer import Hooks


class Fails(Hooks):
    def before_training(self, trainer):
        self.rank = trainer.world.rank

    def after_step(self, step):
        if (self.rank, step) == (1, 3):
            raise ArithmeticError("planted")


class Stops(Hooks):
    def stop_requested(self, last_step=False):
        return None
"""


def node(folder: Path, data_dir: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of two processes of launch/node in `folder`, which has my_hooks.py."""
    (folder / "my_hooks.py").write_text(HOOKS)
    command = [str(runs.REPOSITORY / "launch/node"), *runs.SMALL, "--data.dir", str(data_dir), "--run.dir", "run"]
    environment = {"NPROC_PER_NODE": "2", "PYTHONPATH": str(runs.REPOSITORY)}
    result = subprocess.run(
        [*command, *words], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout


def test_unusable_hooks(data_dir: Path, tmp_path: Path) -> None:
    """The message comes once, before there is a run directory. The module is found in the working directory."""
    code, output = node(tmp_path, data_dir, "--run.hooks", "my_hooks:Stops")
    assert code == 2
    assert [line for line in output.splitlines() if "my_hooks" in line] == [
        "error: run.hooks is my_hooks:Stops, which has stop_requested, but a run calls only its own. Leave it out."
    ]
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hook_that_raises_on_one_rank_ends_all(data_dir: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    code, output = node(tmp_path, data_dir, "--run.hooks", "my_hooks:Fails", "--train.max_steps", "400")
    assert code == 1
    assert time.monotonic() - started < 100
    assert 'my_hooks.py", line 11, in after_step' in output
    assert "ArithmeticError: planted" in output
