"""Promises 1 to 4 in whole runs: training and scores do not depend on the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cifar_dist.training.checkpoint import path_of
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
# Everything that could tell ranks apart is on: dropout, cutout, low resolution, moving average, clipping; and in the
# other network auxiliary heads, filters from the data, merged convolutions, Muon.
EXTRAS = {
    "inception_v1": ("--train.precision", "fp64", "--model.stem", "strided", "--model.dropout", "0.2",
                     "--augment.cutout", "8", "--augment.low_resolution_share", "0.5", "--optim.name", "sgd",
                     "--optim.ema_decay", "0.9", "--optim.grad_clip", "5"),
    "inception_v2": ("--train.precision", "fp64", "--model.auxiliary", "True", "--model.stem", "whiten",
                     "--model.merge_1x1", "on", "--optim.name", "muon", "--optim.ema_decay", "0.9"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["inception_v1", pytest.param("inception_v2", marks=pytest.mark.slow)])
def three_runs(
    request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """The same 20 steps by 1, 2 and 3 processes."""
    folder = tmp_path_factory.mktemp("world")
    options = (*runs.SMALL, "--model.name", request.param, *EXTRAS[request.param], "--data.dir", data_dir)
    for world_size in (1, 2, 3):
        runs.run(world_size, *options, "--run.dir", folder / str(world_size))
    return {world_size: folder / str(world_size) for world_size in (1, 2, 3)}


def test_all_world_sizes_are_fed_the_same(three_runs: dict[int, Path]) -> None:
    receipts = {size: runs.summary(folder)["data_receipt"] for size, folder in three_runs.items()}
    assert len(receipts[1]) == 1
    assert receipts[1] == receipts[2] == receipts[3]
    assert {runs.summary(folder)["samples_dropped_per_epoch"] for folder in three_runs.values()} == {0}


@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_agree_in_float64(three_runs: dict[int, Path], world_size: int) -> None:
    one, other = (runs.weights(three_runs[size], 20) for size in (1, world_size))
    assert one.keys() == other.keys()
    largest = max((one[name].double() - other[name].double()).abs().max().item() for name in one)
    assert largest < 1e-10


def test_scores_agree(three_runs: dict[int, Path]) -> None:
    scores = [runs.summary(folder) for folder in three_runs.values()]
    assert [score["world_size"] for score in scores] == [1, 2, 3]
    assert {score["test_n"] for score in scores} == {500}
    assert scores[0]["test_confusion"] == scores[1]["test_confusion"] == scores[2]["test_confusion"]


@pytest.mark.parametrize("ema_decay", [pytest.param("None", marks=pytest.mark.slow), "0.9"])
def test_evaluate_counts_are_equal_for_any_world_size(ema_decay: str, data_dir: Path, tmp_path: Path) -> None:
    """In bf16, where a hardly trained network's answers hang on the last bit, and on more threads with one rank; with
    auxiliary heads, which evaluation leaves out, and filters that are no parameters."""
    run_dir = tmp_path / "run"
    runs.run(1, *runs.SMALL, "--train.precision", "bf16", "--model.auxiliary", "True", "--model.stem", "whiten",
             "--optim.ema_decay", ema_decay, "--eval.test_subset", "None", "--data.dir", data_dir,
             "--run.dir", run_dir)  # fmt: skip
    checkpoint = path_of(run_dir / "checkpoints", 20)
    results: dict[int, dict[str, Any]] = {}
    for world_size in (1, 3):
        out = tmp_path / f"{world_size}.json"
        words = runs.command(world_size, "evaluate")
        if world_size == 1:
            words = words[len(runs.ON_ONE_CPU) :]  # so that it has more threads than each of three ranks
        words += ["--checkpoint", str(checkpoint), "--data_dir", str(data_dir), "--json", str(out)]
        runs.finish(runs.start_command(words))
        results[world_size] = json.loads(out.read_text())
        assert results[world_size].pop("world_size") == world_size
    assert results[1]["n"] == 10_000
    assert sum(map(sum, results[3]["confusion"])) == 10_000
    assert results[1]["confusion"] == results[3]["confusion"]
    # The score that the run itself ended with, from the same weights.
    assert results[1]["confusion"] == runs.summary(run_dir)["test_confusion"]
