"""`python -m cifar_dist.evaluate`: which checkpoint of a run it scores, and with which batch-norm statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.training import checkpoint
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]


def evaluate(data_dir: Path, *arguments: str | Path) -> dict[str, Any]:
    output = runs.run(1, *arguments, "--data_dir", data_dir, module="evaluate")
    figures: dict[str, Any] = json.loads(output[output.index("{\n") :])
    return figures


def test_a_checkpoint_without_statistics(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """As older versions saved it: it scores the same, from statistics that are computed anew, and written if asked."""
    expected = evaluate(data_dir, short_run, "--which", "40")
    assert (expected["step"], expected["precision"]) == (40, "fp32")
    new = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(short_run / "checkpoints", 40)), "it")
    old = {key: value for key, value in new.items() if key != "statistics"}
    old["model"] = {
        name: torch.zeros_like(tensor) if "running" in name else tensor for name, tensor in new["model"].items()
    }
    run_dir = tmp_path / "run"
    path = checkpoint.write(run_dir / "checkpoints", 40, checkpoint.encode(40, old))
    assert not checkpoint.decode(checkpoint.read_verified(path), "it")["statistics"]
    found = evaluate(data_dir, run_dir, "--write_statistics", "True")
    assert found["confusion"] == expected["confusion"]
    written = checkpoint.decode(checkpoint.read_verified(path), "it")
    assert written["statistics"]
    assert all(torch.equal(tensor, new["model"][name]) for name, tensor in written["model"].items())
    assert written.keys() == new.keys()


def test_statistics_in_another_precision_are_not_written(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """Of a run with train.precision auto, on a machine that is slow in what that meant."""
    state = checkpoint.decode(checkpoint.path_of(short_run / "checkpoints", 20).read_bytes(), "it")
    config = state["config"].replace("precision: fp32", "precision: auto")
    new = state | {"config": config, "precision": "fp16"}
    path = checkpoint.write(tmp_path, 20, checkpoint.encode(20, new))
    options = ("--data_dir", data_dir, "--device", "cpu", "--write_statistics", "True")
    output = runs.run(1, path, *options, module="evaluate", expected=2)
    assert "error: --write-statistics computes in fp16, as the run did. Use a machine that supports it." in output


def test_statistics_of_the_checkpoint_are_used(short_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """So the score is that of the model which the file holds; in another precision on request."""
    path = checkpoint.path_of(short_run / "checkpoints", 60)
    state = checkpoint.decode(checkpoint.read_verified(path), "it")
    name = next(name for name in state["model"] if name.endswith("running_mean"))
    state["model"][name] += 1
    checkpoint.write(tmp_path, 60, checkpoint.encode(60, state))
    shutil.copy(short_run / "summary.json", tmp_path)
    other = evaluate(data_dir, "--checkpoint", tmp_path / path.name, "--precision", "fp64")
    assert other["precision"] == "fp64"
    assert other["confusion"] != evaluate(data_dir, short_run)["confusion"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one run directory or checkpoint"),
        (("runs/a", "--checkpoint", "b.pt"), "give one run directory or checkpoint"),
        (("no/such/run",), "no/such/run does not exist. Give a run directory"),
        (("runs/a", "--which", "newest"), "newest"),
        (("runs/a", "--write_statistics", "True", "--precision", "fp32"), "leave out --precision"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    output = runs.run(1, *arguments, module="evaluate", expected=2)
    assert message in output
    assert "Traceback" not in output
