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

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist.reports import compare as module
from cifar_dist.reports import curves_of_runs, side_by_side
from cifar_dist.training import checkpoint
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]


def compare(*words: Path | str, expected: int) -> str:
    command = [sys.executable, "-m", "cifar_dist.compare", *map(str, words)]
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


def test_checkpoints_that_cannot_be_read_count_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> list[int]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "all_steps", refuse)
    assert list(module.differences(tmp_path, tmp_path)) == []


def test_other_start_weights_are_a_cause(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"weights_sha256": name * 64}))
    expected = [f"weights_sha256: {'a' * 45} and {'b' * 45}"]
    assert list(module.other_causes(tmp_path / "a", tmp_path / "b")) == expected


def test_plot_without_values_that_are_no_numbers(tmp_path: Path) -> None:
    values: tuple[object, ...] = (2.5, "abc", {}, [1], None, "nan", 2.0, 10**400)
    lines = [json.dumps({"step": k, "train/loss": value, "lr": value}) for k, value in enumerate(values, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves_of_runs.draw({"run": tmp_path}, tmp_path / "curves.png")
    assert colour_of(tmp_path / "curves.png", curves_of_runs.COLOURS[0]) > 20


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


def new_rate(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("\n  lr: ", "\n  lr: 1"))


def other_network(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(
        path.read_text()
        .replace("name: inception_v1", "name: inception_v2")
        .replace("\n  resume: never", "\n  resume: auto")
    )
    change_summary(run, params=1_234_567, model="inception_v2")


SETTINGS: dict[Callable[[Path], None], tuple[str, ...]] = {
    other_seed: ("possible cause: run.seed is 0 and 1",),
    new_rate: (r"possible cause: optim\.lr is ([\d.]+) and 1\1",),
    other_network: ("possible cause: model.name is inception_v1 and inception_v2", r"parameters +[\d,]+ +1,234,567"),
}


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change.__name__)
def test_settings_and_figures_on_one_screen(change: Callable[[Path], None], short_run: Path, tmp_path: Path) -> None:
    """Of two runs that differ in one setting which matters, one that does not, and in their scores."""
    other = tmp_path / "other"
    shutil.copytree(short_run, other)
    change(other)
    other_loss(other)
    change_summary(other, test_accuracy=0.5, model_sha256="0" * 64)
    config = other / "config.yaml"
    text = config.read_text().replace("keep_checkpoints: 3", "keep_checkpoints: 4")
    config.write_text(text.replace("notes: null", 'notes: "a\\nb: EQUAL\\e[31m"'))
    output = compare(short_run, other, expected=1)
    for text in SETTINGS[change]:
        assert re.search(text, output), output
    assert output.count("possible cause") == 1
    notes = r"track.notes is None and a\nb: EQUAL\x1b[31m"  # escaped
    assert f"\n  other settings: train.keep_checkpoints is 3 and 4; {notes}\n" in output
    first = runs.summary(short_run)
    assert re.search(rf"test accuracy +{100 * first['test_accuracy']:.2f} %, n = 500 +50\.00 %, n = 500\n", output)
    assert re.search(r"\n  95 % interval  .* 45\.63 to 54\.37 %\n", output)
    assert len(output.splitlines()) <= 32
    assert max(map(len, output[output.index("\n\n") :].replace(str(short_run), "").splitlines())) <= 120


def test_settings_of_equal_runs_had_no_effect(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "copy")
    config = tmp_path / "copy/config.yaml"
    config.write_text(config.read_text().replace("tf32: true", "tf32: false").replace("resume: never", "resume: auto"))
    output = compare(short_run, tmp_path / "copy", expected=0)
    assert "\n  other settings without an effect: train.tf32 is true and false\n" in output


def test_many_runs_are_shown_in_tables_of_100_columns(short_run: Path, tmp_path: Path) -> None:
    copies = [tmp_path / f"run-{k}" for k in range(7)]
    for copy in copies:
        shutil.copytree(short_run, copy)
    tables = side_by_side.figures(copies).split("\n\n")
    assert len(tables) > 1
    assert max(len(line) for table in tables for line in table.splitlines()) <= 100
    assert [name for table in tables for name in table.splitlines()[0].split()] == [copy.name for copy in copies]
    assert all(re.search(r"\nimages/s( +[\d,]+)+\n", table) for table in tables)


def test_figures_of_unfinished_and_damaged_runs(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "half")
    (tmp_path / "half/summary.json").unlink()
    shutil.copytree(short_run, tmp_path / "odd")
    (tmp_path / "odd/summary.json").write_text(json.dumps(dict.fromkeys(runs.summary(short_run), "x")))
    (tmp_path / "odd/config.yaml").write_text("[")
    (tmp_path / "none").mkdir()
    output = side_by_side.figures([tmp_path / "half", tmp_path / "odd", tmp_path / "none"])
    assert output.splitlines()[0].split() == ["half", "odd", "none"]
    assert re.search(r"state +damaged +damaged +unfinished", output)
    assert re.search(r"training loss +\d\.\d{4} +\d\.\d{4} +-", output)


def colour_of(picture: Path, colour: str) -> int:
    image = np.asarray(Image.open(picture).convert("RGB"))
    return int((image == [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).all(axis=-1).sum())


def test_plot(short_run: Path, tmp_path: Path) -> None:
    """Also of runs without metrics, of other epochs, and of names that matplotlib would read as formulas."""
    for name in ("_a$b$", "longer"):
        shutil.copytree(short_run, tmp_path / name)
    path = tmp_path / "longer/metrics.jsonl"
    records = runs.records(short_run)
    halved = [record | {"epoch": record["epoch"] / 2} for record in records if "epoch" in record]
    path.write_text("".join(json.dumps(record) + "\n" for record in halved))
    (tmp_path / "_a$b$/metrics.jsonl").unlink()
    out = tmp_path / "curves.png"
    names: list[Path | str] = [short_run, f"{tmp_path}/_a$$b$$", tmp_path / "longer"]
    assert "DIFFERENT" in compare(*names, "--plot", out, expected=1)  # in the epochs
    assert Image.open(out).size == (1560, 600)
    drawn = [colour_of(out, colour) for colour in curves_of_runs.COLOURS]
    assert min(drawn[0], drawn[2]) > 300
    assert 20 < drawn[1] < 200  # in the legend
    assert drawn[3] == 0
    message = f"--plot {tmp_path}/none/x.png cannot be written"
    assert message in compare(*names, "--plot", tmp_path / "none/x.png", expected=2)
