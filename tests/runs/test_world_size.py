"""Promises 1 to 4 in whole runs: training and scores do not depend on the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cifar_dist.training.checkpoint import path_of
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.timeout(900)]
LONG = (pytest.mark.slow, pytest.mark.long)
# An epoch of 12 steps, with three micro-batches each for 8 processes.
FEW_STEPS = ("--data.subset", "1152", "--train.max_steps", "12", "--train.micro_batch_size", "4")
# Everything that could tell ranks apart is on in one of them: dropout, cutout, low resolution, moving average,
# clipping, auxiliary heads, filters from the data, merged convolutions, Muon, validations, accumulation on fewer ranks.
# auto is bf16, or fp32 on processors for which bf16 takes minutes.
KINDS = {
    "v1 auto": ("--train.precision", "auto", "--model.stem", "strided", "--model.dropout", "0.2",
                "--augment.cutout", "8", "--augment.low_resolution_share", "0.5", "--optim.name", "sgd",
                "--optim.ema_decay", "0.9", "--optim.grad_clip", "0.5"),
    "v2 fp32": ("--train.precision", "fp32", "--model.name", "inception_v2", "--model.auxiliary", "True",
                "--model.stem", "whiten", "--model.merge_1x1", "on", "--optim.name", "muon",
                "--data.train_on", "train", "--eval.every_epochs", "1", "--eval.tta", "six"),
    "v2 fp64": ("--train.precision", "fp64", "--model.name", "inception_v2", "--model.stem", "whiten",
                "--optim.name", "muon", "--optim.ema_decay", "0.9"),
    "v1 fp16": ("--train.precision", "fp16", "--model.stem", "pooled", "--model.auxiliary", "True",
                "--optim.name", "sgd", "--optim.grad_clip", "0.5", "--train.max_steps", "6"),
    "v1 compiled": ("--train.precision", "fp32", "--train.compile", "on"),
}  # fmt: skip


def results(run_dir: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on the number of processes."""
    names = ("model_sha256", "data_receipt", "test_confusion", "test_loss", "test_accuracy_tta", "val_accuracy")
    summary = runs.summary(run_dir)
    return {name: summary[name] for name in names} | {"metrics": runs.records_without_times(run_dir)}


@pytest.mark.parametrize(
    ("kind", "world_sizes"),
    [
        ("v1 auto", (1, 2, 3)),
        # The more processes share the processors, the slower they are; the same code runs on each.
        pytest.param("v1 auto", (1, 4, 6, 8), marks=LONG),
        pytest.param("v2 fp32", (1, 2, 3, 4, 6, 8), marks=LONG),
        pytest.param("v2 fp64", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("v1 fp16", (1, 2, 3), marks=LONG),
        pytest.param("v1 compiled", (1, 2), marks=LONG),
    ],
)
def test_any_number_of_processes_computes_the_same(
    kind: str, world_sizes: tuple[int, ...], data_dir: Path, tmp_path: Path
) -> None:
    """To the bit: weights, every line of metrics but for times, and the answers of the test."""
    options = (*runs.SMALL, *FEW_STEPS, *KINDS[kind], "--data.dir", str(data_dir))
    found = {}
    for world_size in world_sizes:
        process = runs.start(world_size, *options, "--run.dir", tmp_path / str(world_size))
        runs.finish(process, timeout_s=400)
        assert runs.summary(tmp_path / str(world_size))["world_size"] == world_size
        found[world_size] = results(tmp_path / str(world_size))
    first, *others = found.values()
    assert len(first["metrics"]) >= 2
    assert all(other == first for other in others)


@pytest.mark.slow
def test_without_the_exact_sum_it_does_not(data_dir: Path, tmp_path: Path) -> None:
    """So the test above can fail."""
    options = (*runs.SMALL, *FEW_STEPS, "--train.precision", "fp32", "--data.dir", str(data_dir))
    for world_size in (1, 3):
        runs.run(world_size, *options, "--train.exact_sum", "off", "--run.dir", tmp_path / str(world_size))
    one, three = (results(tmp_path / str(world_size)) for world_size in (1, 3))
    assert one["data_receipt"] == three["data_receipt"]
    assert one["model_sha256"] != three["model_sha256"]


@pytest.mark.parametrize("ema_decay", [pytest.param("None", marks=pytest.mark.slow), "0.9"])
def test_evaluate_counts_are_equal_for_any_world_size(ema_decay: str, data_dir: Path, tmp_path: Path) -> None:
    """Of a hardly trained network, whose answers in bf16 hang on the last bit, and on more threads with one rank; with
    auxiliary heads, which evaluation leaves out, and filters that are no parameters."""
    run_dir = tmp_path / "run"
    runs.run(1, *runs.SMALL, "--train.precision", "auto", "--model.auxiliary", "True", "--model.stem", "whiten",
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
    runs.assert_loads_as_evaluated(run_dir, data_dir)
