"""The presets for GPUs, their whole schedules at a fraction of the size: every epoch, one small step in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cifar_dist import cli
from cifar_dist.training.schedule import lr_fraction
from tests.support import runs

CONFIGS = runs.REPOSITORY / "configs"
GPU_PRESETS = ["googlenet", "inception_v2", "speed-94", "speed-96"]
FOR_8_GPUS = ["speed-94-8gpu", "speed-96-8gpu"]
PRESETS = [*GPU_PRESETS, *FOR_8_GPUS, "quickstart", "cpu-84"]
REDUCED = ("--model.width", "0.0625", "--data.subset", "32", "--train.batch_size", "32", "--train.micro_batch_size",
           "16", "--eval.every_epochs", "0", "--eval.tta", "none", "--eval.bn_samples", "250",
           "--eval.test_subset", "500", "--train.log_every_steps", "1", "--track.wandb", "disabled")  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_config_headers_state_hardware_and_accuracy(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert text.startswith(header)
    assert f"configs/{name}.yaml" in header or f"./launch/{name}" in header
    assert "Hardware: " in header
    measured = "Test accuracy" in header and "n = 10,000" in header and "seed" in header
    assert measured or "not measured yet" in header


@pytest.mark.parametrize("name", FOR_8_GPUS)
def test_presets_for_eight_gpus(name: str) -> None:
    """One micro-batch per GPU and step. All else is as for one GPU, so its schedule is the one below."""
    config, of_one = (cli.read_yaml(CONFIGS / f"{file}.yaml") for file in (name, name.removesuffix("-8gpu")))
    assert cli.accumulation_steps(config.train.batch_size, config.train.micro_batch_size, 8) == 1
    train = replace(config.train, micro_batch_size=of_one.train.micro_batch_size)
    assert replace(config, train=train) == of_one


@pytest.mark.run
@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["speed-94", *(pytest.param(name, marks=pytest.mark.slow) for name in GPU_PRESETS if name != "speed-94")]
)
def test_schedule_runs_to_its_end(name: str, data_dir: Path, tmp_path: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = cli.read_yaml(path)
    epochs = config.train.epochs
    runs.run(1, "--config", path, *REDUCED, "--data.dir", data_dir, "--run.dir", tmp_path / "run")
    summary = runs.summary(tmp_path / "run")
    assert (summary["epochs"], summary["steps"], len(summary["data_receipt"])) == (epochs, epochs, epochs)
    records = runs.records(tmp_path / "run")
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, epochs + 1))
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    # The rates follow the schedule, and the last step is all but still.
    peak = config.optim.lr * 32 / 128
    assert [record["lr"] for record in steps] == pytest.approx(
        [peak * lr_fraction(step, epochs, config.optim) for step in range(epochs)]
    )
    assert steps[-1]["lr"] < 0.1 * peak
