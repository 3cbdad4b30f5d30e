"""Comparing runs: equal ones, and where others part first."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.training import checkpoint
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]


def compare(*run_dirs: Path, expected: int) -> str:
    command = [sys.executable, "-m", "cifar_dist.compare", *map(str, run_dirs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.REPOSITORY, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def other_seed(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))


def other_data(run: Path) -> None:
    change_summary(run, data_receipt=["0" * 32])


def change_summary(run: Path, **values: object) -> None:
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_loss(run: Path) -> None:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[3]["train/loss"] += 1e-12
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def changed_checkpoint(run: Path, step: int) -> Iterator[dict[str, Any]]:
    """The state in a checkpoint of `run`, which is written again with what is changed in it."""
    folder = run / "checkpoints"
    state = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(folder, step)), "it")
    yield state
    checkpoint.write(folder, step, checkpoint.encode(step, state))


def other_parameter(run: Path) -> None:
    """By one unit in the last place, in the second checkpoint."""
    with changed_checkpoint(run, 40) as state:
        weight = state["model"]["classifier.weight"]
        weight[3, 1] = torch.nextafter(weight[3, 1], torch.tensor(torch.inf))


def other_format(run: Path) -> None:
    with changed_checkpoint(run, 20) as state:
        state["model"]["classifier.weight"] = state["model"]["classifier.weight"].double()


def damaged_checkpoint(run: Path) -> None:
    path = checkpoint.path_of(run / "checkpoints", 20)
    path.write_bytes(path.read_bytes()[:-1])


def other_version(run: Path) -> None:
    """One setting less, and one more."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("exact_sum: ", "sum_of_old: "))
    other_loss(run)


def damaged_settings(run: Path) -> None:
    (run / "config.yaml").write_text("model: {")
    other_loss(run)


def odd_values(run: Path) -> None:
    change_summary(run, data_receipt=None, test_accuracy=None, versions=None, device_names=None)


def postponed_validation(run: Path) -> None:
    """A checkpoint of a stop, before the statistics of batch norm were set."""
    with changed_checkpoint(run, 20) as state:
        state["validation_due"] = True
        state["model"]["classifier.weight"] += 1


def another_number_of_processes(run: Path) -> None:
    """Is no difference."""
    change_summary(run, world_size=3, train_seconds=1.0, device_names=3 * runs.summary(run)["device_names"])


@pytest.mark.parametrize("change", [another_number_of_processes, damaged_checkpoint, odd_values, postponed_validation])
def test_equal(change: Callable[[Path], None], short_run: Path, tmp_path: Path) -> None:
    """Also where something is missing or damaged."""
    shutil.copytree(short_run, tmp_path / "copy")
    change(tmp_path / "copy")
    output = compare(short_run, tmp_path / "copy", expected=0)
    assert "EQUAL" in output
    assert "DIFFERENT" not in output
    assert runs.summary(short_run)["model_sha256"][:16] in output


def test_long_values_are_shown_where_they_differ(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "copy")
    confusion = runs.summary(short_run)["test_confusion"]
    confusion[9][9] = 777
    change_summary(tmp_path / "copy", test_confusion=confusion)
    assert re.search(r"test_confusion: .* and .* 777\]\]$", compare(short_run, tmp_path / "copy", expected=1), re.M)


CHANGES: dict[Callable[[Path], None], str] = {
    other_data: "data: from epoch 1 on",
    other_loss: "metrics: from step 16 on; there train/loss is",
    other_parameter: "parameters: in the checkpoints of step 40, 1 of",
    other_format: "parameters: in the checkpoints of step 20, of another network, optimizer or number format",
    other_version: "possible cause: train.exact_sum is on and no setting",
    damaged_settings: "other/config.yaml cannot be read",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_first_difference_is_named(change: Callable[[Path], None], short_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(short_run, other)
    change(other)
    if change is not damaged_settings:
        other_seed(other)  # a cause, which is named after the differences
    output = compare(short_run, other, expected=1)
    assert "DIFFERENT" in output
    assert CHANGES[change] in output
    assert change is damaged_settings or "possible cause: run.seed is 0 and 1" in output


def test_an_unfinished_run_is_compared_as_far_as_it_goes(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "half")
    (tmp_path / "half/summary.json").unlink()
    output = compare(short_run, tmp_path / "half", expected=1)
    assert f"UNDECIDED, what both have is equal; only {short_run} is finished" in output
    assert "DIFFERENT" not in output
    with changed_checkpoint(tmp_path / "half", 40) as state:
        state["receipt"][1][2] += 1
    assert "data: before the checkpoints of step 40, other samples" in compare(short_run, tmp_path / "half", expected=1)


def test_a_run_without_a_line_yet(short_run: Path, tmp_path: Path) -> None:
    shutil.copy2(short_run / "config.yaml", tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy2(short_run / "config.yaml", tmp_path / "other")
    assert f"only {short_run} is finished" in compare(tmp_path, short_run, expected=1)
    assert "neither is finished" in compare(tmp_path, tmp_path / "other", expected=1)


def test_other_log_steps_are_no_difference(short_run: Path, tmp_path: Path) -> None:
    """Nor that a run was resumed in another directory, whose first line is a later one."""
    records = runs.records(short_run)
    for name, steps in (("seldom", range(0, 61, 8)), ("late", range(24, 61))):
        shutil.copytree(short_run, tmp_path / name)
        kept = [dict(record) for record in records if record["step"] in steps]
        for record in kept:
            if name == "seldom" and "train/loss" in record:
                record["train/loss"] += 0.1  # over more steps
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
        assert "EQUAL" in compare(short_run, tmp_path / name, expected=0)


@pytest.mark.parametrize(
    ("names", "message"), [(["run"], "at least two"), (["run", "nothing"], "no config.yaml"), (["run", "run"], "twice")]
)
def test_what_cannot_be_compared(names: list[str], message: str, short_run: Path, tmp_path: Path) -> None:
    found = {"run": short_run, "nothing": tmp_path}
    assert message in compare(*(found[name] for name in names), expected=2)
