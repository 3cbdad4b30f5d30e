"""The profiler around some multiplications: which steps it records, and what cannot be written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from cifar_dist.distributed import World
from cifar_dist.training.profiling import profiler

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def lines_of(folder: Path, num_steps: int, steps_left: int, done: int) -> list[str]:
    """What is logged while `done` steps are done, each of one product of matrices."""
    lines: list[str] = []
    x = torch.ones(64, 64)
    with profiler(num_steps, steps_left, folder, ALONE, lines.append) as step:
        for _ in range(done):
            x @ x
            step()
    return lines


@pytest.mark.parametrize(
    ("num_steps", "steps_left", "done", "recorded"), [(2, 9, 9, 2), (9, 5, 5, 2), (9, 1, 1, 1), (4, 9, 5, 2)]
)
def test_steps_that_are_recorded(num_steps: int, steps_left: int, done: int, recorded: int, tmp_path: Path) -> None:
    """After three steps that are not, also in a run that is too short, or ends earlier than planned."""
    folder = tmp_path / "profile"
    assert lines_of(folder, num_steps, steps_left, done) == [
        f"profile of {recorded} steps: {folder}/rank-0.txt and rank-0.json.gz"
    ]
    events = json.loads(gzip.decompress((folder / "rank-0.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == recorded
    assert "aten::mm" in (folder / "rank-0.txt").read_text()


def test_without_profile(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "profile", 0, 9, 9) == []
    assert lines_of(tmp_path / "profile", 3, 0, 0) == []
    assert not (tmp_path / "profile").exists()


def test_what_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    (line,) = lines_of(tmp_path / "profile", 2, 9, 9)
    assert line.startswith("warning: no profile: FileExistsError: ")
