"""Nothing grows from epoch to epoch: memory, objects, threads, open files; over whole runs, in each process."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.support import growing, runs

pytestmark = [pytest.mark.run, pytest.mark.data]
# 5 steps an epoch, each with a validation, a checkpoint and log steps.
SETTINGS = (
    *runs.SMALL, "--train.precision", "fp32", "--data.train_on", "train", "--data.subset", "160",
    "--train.batch_size", "32", "--train.max_steps", str(5 * (growing.LAST + 2)), "--train.log_every_steps", "2",
    "--train.checkpoint_every_steps", "5", "--eval.every_epochs", "1", "--eval.bn_samples", "64",
    "--eval.batch_size", "60",
)  # fmt: skip
Record = dict[str, Any]
# Bytes that the median epoch may add: a digest per epoch, buffers that fill up slowly. 6,000, 35,000 and 970,000 were
# seen, the most with two processes. The median, as malloc and the kernel move up to 16 MB in one epoch now and then.
SPARE_BYTES = {"Python bytes": 20_000, "malloc bytes": 150_000, "resident bytes": 3_000_000}


@pytest.fixture(scope="module", params=[
    pytest.param(1, id="alone"), pytest.param(2, id="two processes", marks=pytest.mark.slow)
])  # fmt: skip
def measured(request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """By rank, a record for each epoch of a run that leaks in its second half."""
    world_size, folder = request.param, tmp_path_factory.mktemp("growth") / "run"
    words = [*runs.command(world_size)[:-1], "tests.support.growing"]
    settings = map(str, (*SETTINGS, "--data.dir", data_dir, "--run.dir", folder))
    # Stopped as asked to; torchrun makes 1 of every code.
    runs.finish(runs.start_command([*words, *settings]), expected=75 if world_size == 1 else 1)
    texts = [(folder / f"growth-{rank}.jsonl").read_text() for rank in range(world_size)]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def grown(records: list[Record], first: int, last: int) -> dict[str, int]:
    """What was more after each epoch than after the one before (bytes: after most), and how much in all."""
    chosen = [flat(record) for record in records if first <= record["epoch"] <= last]
    assert len(chosen) == last - first + 1
    steps = {
        name: [later.get(name, 0) - earlier.get(name, 0) for earlier, later in pairwise(chosen)]
        for name in chosen[0].keys() | chosen[-1].keys()
    }
    return {name: sum(changes) for name, changes in steps.items() if is_growth(name, changes)}


def is_growth(name: str, changes: list[int]) -> bool:
    if name in SPARE_BYTES:
        return median(changes) > SPARE_BYTES[name]
    return min(changes) > 0


def flat(record: Record) -> Record:
    numbers = {name: value for name, value in record.items() if name not in ("epoch", "objects")}
    return {**numbers, **record["objects"]}


def test_memory_and_files_do_not_grow(measured: list[list[Record]]) -> None:
    """Over five epochs, the first one aside, which fills caches."""
    for records in measured:
        assert grown(records, growing.WARM, growing.LEAKS_FROM - 1) == {}


def test_growth_is_detected(measured: list[list[Record]]) -> None:
    for records in measured:
        found = grown(records, growing.LEAKS_FROM, growing.LAST)
        assert found.keys() >= set(records[0]) - {"epoch", "objects"}
        epochs = growing.LAST - growing.LEAKS_FROM
        assert found["tensors"] == 5 * epochs
        assert found["__main__.Kept"] == found["threads"] == found["open files"] == epochs
