"""What a whole run leaves behind, with the real W&B offline."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cifar_dist.cli import read_yaml
from cifar_dist.config import to_yaml
from cifar_dist.data.prepare.collection import Cifar10
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
KEYS = {
    "command", "git_commit", "git_diff_sha256", "versions", "device_names", "world_size", "model", "params", "seed",
    "steps", "epochs", "batch_size", "micro_batch_size", "samples_dropped_per_epoch", "train_seconds",
    "images_per_second", "first_step_seconds", "startup_seconds", "val_accuracy", "val_n", "test_accuracy",
    "test_accuracy_tta", "test_n",
    "data_receipt", "model_sha256",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, a split with validation, a tail that does not fill a batch."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    options = (*runs.SMALL, "--data.train_on", "train", "--data.subset", "1000", "--train.max_steps", "12",
               "--train.precision", "fp32", "--train.log_every_steps", "5", "--eval.every_epochs", "1",
               "--eval.tta", "flip", "--track.wandb", "auto", "--run.seed", "3",
               "--eval.test_subset", "None")  # fmt: skip
    output = runs.run(2, *options, "--data.dir", data_dir, "--run.dir", folder)
    assert "40 samples dropped per epoch" in output
    return folder


def test_summary(run_dir: Path) -> None:
    figures = runs.summary(run_dir)
    assert figures.keys() >= KEYS
    assert (figures["steps"], figures["epochs"], figures["samples_dropped_per_epoch"]) == (12, 1.2, 40)
    assert (figures["world_size"], len(figures["device_names"])) == (2, 2)
    assert (figures["val_n"], figures["test_n"], figures["seed"]) == (5000, 10_000, 3)
    assert sum(map(sum, figures["test_confusion"])) == 10_000
    assert [sum(row) for row in figures["test_confusion"]] == [1000] * 10
    hits = sum(figures["test_confusion"][c][c] for c in range(10))
    assert figures["test_accuracy"] == hits / 10_000
    assert 0.05 < figures["test_accuracy_tta"] < 1
    assert figures["images_per_second"] == pytest.approx(12 * 96 / figures["train_seconds"])
    assert len(figures["data_receipt"]) == 2
    startup = figures["startup_seconds"]
    assert next(iter(startup)) == "python and imports"
    assert startup["reading the first data"] > 0 < startup["the update of the weights"]
    assert sum(startup.values()) == pytest.approx(figures["first_step_seconds"], abs=0.1)
    assert figures["versions"]["ffcv"] == "1.0.2"
    assert "cifar_dist.train" in figures["command"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=runs.REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (figures["git_commit"] or "").startswith(commit.stdout.strip())


def test_summary_of_a_part_of_the_test_set(short_run: Path) -> None:
    figures = runs.summary(short_run)
    assert figures["test_n"] == 500
    assert [sum(row) for row in figures["test_confusion"]] == [50] * 10
    assert "% on 500 of 10,000 (eval.test_subset) images; " in (short_run / "logs/rank-0.log").read_text()


def test_config_is_complete_and_reads_back(run_dir: Path) -> None:
    config = read_yaml(run_dir / "config.yaml")
    assert to_yaml(config) == (run_dir / "config.yaml").read_text()
    assert (config.train.batch_size, config.train.precision, config.optim.momentum) == (96, "fp32", 0.9)
    assert yaml.safe_load((run_dir / "config.yaml").read_text()).keys() == {
        "run", "data", "model", "train", "optim", "augment", "eval", "track", "debug"
    }  # fmt: skip


def test_metrics(run_dir: Path) -> None:
    records = runs.records(run_dir)
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == [5, 10, 12]
    assert [record["step"] for record in records if "val/accuracy" in record] == [10, 12]
    assert [record["test/n"] for record in records if "test/n" in record] == [10_000]
    training = [record for record in records if "train/loss" in record]
    assert all(0 <= record[name] <= 1 for record in training for name in ("train/accuracy", "data_wait"))
    assert all(record["train/loss"] < record["train/objective"] for record in training[1:])  # by label smoothing
    assert all(0 < record["gradient_norm"] < 100 for record in training)
    assert all(record["lr/biases"] == pytest.approx(32 * record["lr"]) for record in training)
    assert "lr/muon" in training[0]


def test_answers_and_pictures(run_dir: Path, cifar: Cifar10) -> None:
    """predictions.csv gives the confusion matrix; the sprite has the most probable of its mistakes, in that order."""
    lines = (run_dir / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,label,predicted,probability"
    cells = [line.split(",") for line in lines[1:]]
    answers = [(int(image), int(label), int(predicted), float(p)) for image, label, predicted, p in cells]
    assert [image for image, *_ in answers] == list(range(10_000))
    confusion = [[0] * 10 for _ in range(10)]
    for _, label, predicted, probability in answers:
        confusion[label][predicted] += 1
        assert 0.1 <= probability <= 1
    assert confusion == runs.summary(run_dir)["test_confusion"]
    worst = sorted((-p, image) for image, label, predicted, p in answers if label != predicted)[:24]
    sprite = np.asarray(Image.open(run_dir / "mistakes.png"))
    assert sprite.shape == (4 * 32, 6 * 32, 3)
    for k, (_, image) in enumerate(worst):
        y, x = k // 6 * 32, k % 6 * 32
        assert np.array_equal(sprite[y : y + 32, x : x + 32], cifar.test_images[image]), k
    assert Image.open(run_dir / "filters.png").size == (16 * 5 - 1, 6 * 5 - 1)  # 96 filters of 4 x 4


def test_files(run_dir: Path) -> None:
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{100 * runs.summary(run_dir)['test_accuracy']:.2f}" in (run_dir / "report.html").read_text()
    for rank in (0, 1):
        lines = (run_dir / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert any("step 12" in line for line in lines)
        assert "test accuracy" in lines[-1]  # the last thing that a run does
    (tracked,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    written = tracked.read_bytes()
    assert b"test/accuracy" in written
    assert runs.summary(run_dir)["model_sha256"].encode() in written  # the summary comes when W&B is closed
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    assert (run_dir / "wandb_id.txt").read_text().strip()
    assert not (run_dir / ".lock").exists()


def test_checkpoints_are_plain_and_clean(run_dir: Path) -> None:
    weights = runs.weights(run_dir, 12)
    assert "classifier.weight" in weights
    assert not [name for name in weights if name.startswith(("module.", "_orig_mod"))]


def test_no_process_stays_behind(run_dir: Path) -> None:
    assert runs.children_with(str(run_dir)) == []
