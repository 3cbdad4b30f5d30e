"""The checkpoint that a path and --which name. Resuming is tested in tests/runs/ and in test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.training import checkpoint
from cifar_dist.training.run_directory import find_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With checkpoints of the steps 5, 10 and 15, of which the first is the best."""
    for step in (5, 10, 15):
        state = {"model": {"x": torch.zeros(1)}, "config": to_yaml(Config()), "best": [5, 0.9]}
        checkpoint.write(tmp_path / "run" / "checkpoints", step, checkpoint.encode(step, state))
    return tmp_path / "run"


@pytest.mark.parametrize(("which", "step"), [("last", 15), ("best", 5), (10, 10)])
def test_of_a_run(run_dir: Path, which: str | int, step: int) -> None:
    expected = checkpoint.path_of(run_dir / "checkpoints", step)
    assert find_checkpoint(run_dir, which) == expected
    assert find_checkpoint(run_dir / "checkpoints", which) == expected


def test_a_file_is_itself(run_dir: Path) -> None:
    path = checkpoint.path_of(run_dir / "checkpoints", 5)
    assert find_checkpoint(path) == path
    with pytest.raises(UserError, match=r"--which best chooses a checkpoint of a run directory, but .*5\.pt is a file"):
        find_checkpoint(path, "best")


def test_missing_ones_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint of step 7\. It has those of the steps 5, 10, 15\."):
        find_checkpoint(run_dir, 7)
    checkpoint.path_of(run_dir / "checkpoints", 5).unlink()
    with pytest.raises(UserError, match=r"no checkpoint of step 5\. It has those of the steps 10, 15\."):
        find_checkpoint(run_dir, "best")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no checkpoint\. Give a run directory"):
        find_checkpoint(tmp_path / "empty")


def test_without_a_validation(run_dir: Path) -> None:
    state = {"model": {}, "config": to_yaml(Config()), "best": [None, -1.0]}
    checkpoint.write(run_dir / "checkpoints", 20, checkpoint.encode(20, state))
    with pytest.raises(UserError, match=r"has no best checkpoint, as no validation was done"):
        find_checkpoint(run_dir, "best")


def test_a_damaged_newest_one_is_no_reason_to_take_another(run_dir: Path) -> None:
    """The model would be an older one than asked for. `read_verified` refuses the file."""
    path = checkpoint.path_of(run_dir / "checkpoints", 15)
    path.write_bytes(path.read_bytes()[:-1])
    assert find_checkpoint(run_dir, "last") == path
    with pytest.raises(CheckpointError, match="is damaged"):
        find_checkpoint(run_dir, "best")
