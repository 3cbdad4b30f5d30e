"""The plan against a real run, its refusals, and its page and figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.cli import load_config
from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.plan import parse, time_limit_seconds
from cifar_dist.planning.plan import (
    Figures,
    Findings,
    TrainingTime,
    check,
    check_time_limit,
    clock,
    from_speed,
    make_plan,
    measure,
)
from cifar_dist.planning.report import page
from cifar_dist.training.checkpoint import path_of
from cifar_dist.training.train_step import TrainStep
from tests.support import runs

CONFIG = str(runs.REPOSITORY / "configs/quickstart.yaml")
# 24 steps of 1,000 samples in batches of 96, a tail of 40 in each epoch, a validation after each.
SETTINGS = (
    "--model.width", "0.0625", "--train.device", "cpu", "--data.train_on", "train", "--data.subset", "1000",
    "--train.batch_size", "96", "--train.micro_batch_size", "16", "--train.max_steps", "24", "--eval.tta", "none",
    "--eval.every_epochs", "1", "--eval.bn_samples", "500", "--train.checkpoint_every_steps", "7",
    "--train.log_every_steps", "1", "--optim.ema_decay", "0.9",
)  # fmt: skip


def plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*runs.ON_ONE_CPU, sys.executable, "-m", "cifar_dist.plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=runs.REPOSITORY)


@pytest.fixture(scope="module")
def config(data_dir: Path) -> Config:
    return load_config(["--config", CONFIG, *SETTINGS, "--data.dir", str(data_dir)])


@pytest.fixture(scope="module")
def planned(config: Config) -> Figures:
    """For three devices."""
    return make_plan(config, 1, 3)


# Against a real run


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is planned, run by one process."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ("--config", CONFIG, *SETTINGS, "--data.dir", data_dir, "--track.wandb", "disabled")
    runs.run(1, *options, "--run.dir", folder)
    return folder


@pytest.mark.run
@pytest.mark.data
def test_agrees_with_a_real_run(planned: Figures, config: Config, run_dir: Path) -> None:
    summary, alone = runs.summary(run_dir), make_plan(config, 1, 1)
    for name in ("steps", "epochs", "params", "train_n", "samples_dropped_per_epoch", "accumulation", "val_n",
                 "batch_size", "micro_batch_size", "model", "world_size", "precision"):  # fmt: skip
        assert alone[name] == summary[name], name
    assert (planned["accumulation"], alone["accumulation"]) == (2, 6)
    records = runs.records(run_dir)
    assert [record["step"] for record in records if "val/accuracy" in record] == alone["validations"] == [10, 20, 24]
    rates = {record["step"]: record["lr"] for record in records if "lr" in record}
    assert len(rates) == 24
    for point in alone["learning_rate"].values():
        assert point["SGD"] == pytest.approx(rates[point["step"]])


@pytest.mark.run
@pytest.mark.data
def test_checkpoints_of_a_real_run(planned: Figures, run_dir: Path) -> None:
    there = sorted((run_dir / "checkpoints").glob("step-*.pt"))
    assert len(there) <= planned["checkpoints_kept"] == 3
    size = path_of(run_dir / "checkpoints", 24).stat().st_size
    assert size == pytest.approx(planned["checkpoint_bytes"], rel=0.01)
    # Saved are steps 7, 14, 21, 24, and, if they have the best score so far, the validated steps 10 and 20.
    assert planned["checkpoints_written"] == 6
    assert planned["checkpoints_bytes"] == 4 * planned["checkpoint_bytes"]
    assert sum(path.stat().st_size for path in there) <= planned["checkpoints_bytes"]


@pytest.mark.run
@pytest.mark.data
def test_time_at_the_speed_of_a_real_run(planned: Figures, run_dir: Path, data_dir: Path) -> None:
    summary = runs.summary(run_dir)
    # Three devices are assumed to be three times as fast.
    time = from_speed(summary["images_per_second"], planned)
    assert time.train_seconds == pytest.approx(summary["train_seconds"] / 3)
    assert time.step_seconds == pytest.approx(summary["train_seconds"] / 3 / 24)
    speed = str(summary["images_per_second"])
    result = plan(
        CONFIG, *SETTINGS, "--data.dir", data_dir, "--images-per-second", speed, "--time-limit", "10"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert f"time training {clock(summary['train_seconds'])} (given: " in text
    assert "time limit 10:00; 0" in text
    assert "are assumed to be" not in text


def test_without_validation() -> None:
    settings = ("--train.epochs", "2", "--train.checkpoint_every_steps", "0", "--model.width", "0.0625")
    found = make_plan(load_config(["--config", CONFIG, *settings]), 1, 1)
    assert (found["steps"], found["samples_dropped_per_epoch"], found["validations"]) == (520, 80, [])
    assert (found["checkpoints_written"], found["checkpoints_kept"]) == (1, 1)
    assert found["checkpoints_bytes"] == found["checkpoint_bytes"]
    assert found["low_resolution_steps"] == 416
    peak = found["learning_rate"]["peak"]
    assert [peak[name] for name in ("SGD", "SGD (biases)", "Muon")] == pytest.approx([0.15, 4.8, 0.04])


def test_own_network_and_optimizer() -> None:
    own = ("--model.name", "tests.unit.models.test_own:plain", "--optim.name", "tests.unit.training.test_optim:adamw")
    config = load_config(["--config", CONFIG, *own])
    found = make_plan(config, 1, 1)
    assert found["params"] == (27 + 1 + 2) * 8 + (8 * 64 + 1) * 10
    peak = found["learning_rate"]["peak"]
    assert (peak["AdamW 1"], peak["AdamW 2"]) == pytest.approx((1e-3, config.optim.lr * config.train.batch_size / 128))
    assert "tests.unit.models.test_own:plain: 5,370 parameters" in page(config, found, None, Findings())


@pytest.mark.parametrize(("settings", "points"), [
    ((), {"start": 1, "peak": 5, "halfway": 14, "end": 24}),
    (("--optim.warmup_share", "1"), {"start": 1, "peak": 24, "halfway": 24, "end": 24}),
    (("--train.max_steps", "1"), {"start": 1, "peak": 1, "halfway": 1, "end": 1}),
])  # fmt: skip
def test_steps_at_which_the_learning_rate_is_shown(settings: tuple[str, ...], points: dict[str, int]) -> None:
    changed = load_config(["--config", CONFIG, *SETTINGS, *settings])
    rates = make_plan(changed, 1, 1)["learning_rate"]
    assert {name: point["step"] for name, point in rates.items()} == points


# Time


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 5400), ("1:30", 90), ("01:00:00", 3600), ("48:00:00", 172_800), ("2-3", 183_600), ("1-02:30", 95_400),
    ("0-00:00:10", 10), ("1-00:00:01", 86_401), ("90:00", 5400),
])  # fmt: skip
def test_time_limits(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "1-", "1-1:1:1:1", "1:", ":30", "1.5", "٣", "0", "00:00"])
def test_no_time_limits(text: str) -> None:
    with pytest.raises(UserError, match=f"time_limit is {text}[;,]"):
        time_limit_seconds(text)


def time_limit(time: TrainingTime | None, limit_s: int, resumes: bool = False) -> Findings:
    findings = Findings()
    check_time_limit(time, limit_s, resumes, findings)
    return findings


@pytest.mark.parametrize(("limit", "text"), [
    (120 + 24, "02:24; 0 s are left"), (120 + 30, "02:30; 6 s are left"),
    (120 + 23, "training takes 00:24, so the run takes 2 allocations (1 requeues)."),
    (120 + 10, "3 allocations (2 requeues)."), (120 + 1, "24 allocations (23 requeues)."),
    (120, "training takes 00:24, one step alone 1 s. Raise the limit."), (60, "one step alone"),
])  # fmt: skip
def test_allocations_of_a_time_limit(limit: int, text: str) -> None:
    """24 steps of a second each."""
    found = time_limit(TrainingTime(24.0, 1.0, ""), limit, resumes=True)
    (message,) = [*found.refusals, *found.warnings, *filter(None, [found.time_limit])]
    assert text in message
    assert bool(found.refusals) == ("one step" in text)
    assert bool(found.time_limit) == ("left" in text)


def test_a_time_limit_that_needs_requeues_without_resume() -> None:
    (text,) = time_limit(TrainingTime(24.0, 1.0, ""), 130).refusals
    assert "training takes 00:24, so the run takes 3 allocations. That needs --run.name NAME --run.resume auto" in text


def test_a_time_limit_without_a_training_speed() -> None:
    (text,) = time_limit(None, 60).warnings
    assert text == "the time limit is not checked, because the training speed is not known."


def test_time_of_a_speed(planned: Figures) -> None:
    given = from_speed(32.0, planned)  # a step of 96 images, on three devices
    assert (given.step_seconds, given.train_seconds) == (1.0, 24.0)


def test_clock() -> None:
    seconds = (0.034, 9.94, 59.2, 3600, 90_061)
    assert list(map(clock, seconds)) == ["0.034 s", "9.9 s", "01:00", "1:00:00", "25:01:01"]


# Refusals and warnings


def test_a_sound_run_has_no_findings(config: Config, tmp_path: Path) -> None:
    sound = changed(config, run={"dir": tmp_path / "new" / "run"})
    assert check(sound, make_plan(sound, 1, 3)) == Findings()
    assert not (tmp_path / "new").exists()


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    parts = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **parts)


def test_no_room_on_the_disk(config: Config, planned: Figures, tmp_path: Path) -> None:
    small = changed(config, run={"dir": tmp_path / "new" / "run"})
    assert check(small, planned).refusals == []
    (text,) = check(small, planned | {"checkpoints_bytes": 10**18}).refusals
    assert text.startswith(f"{tmp_path} has ")
    assert "but the checkpoints need 1,000,000,000,000 MB" in text
    old = tmp_path / "new/run/checkpoints/step-00000007.pt"  # replaced by those of the new run
    old.parent.mkdir(parents=True)
    old.touch()
    needed = shutil.disk_usage(tmp_path).free + 10**11
    resumed = changed(small, run={"resume": "auto"})
    assert len(check(resumed, planned | {"checkpoints_bytes": needed}).refusals) == 1
    os.truncate(old, 2 * 10**11)
    assert check(resumed, planned | {"checkpoints_bytes": needed}).refusals == []


def test_a_run_directory_that_cannot_be_used(config: Config, planned: Figures, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "file").touch()
    refusals: Callable[..., list[str]] = lambda **run: check(changed(config, run=run), planned).refusals  # noqa: E731
    assert "already holds a run" in refusals(dir=tmp_path / "run")[0]
    assert "config.yaml is not of a run" in refusals(dir=tmp_path / "run", resume="auto")[0]
    (tmp_path / "run" / "status.json").touch()
    assert refusals(dir=tmp_path / "run", resume="auto") == []
    assert "cannot be written: Not a directory" in refusals(dir=tmp_path / "file" / "run")[0]


def test_warnings(config: Config, planned: Figures, tmp_path: Path) -> None:
    (dataset,) = check(changed(config, data={"dir": tmp_path}), planned).warnings
    assert f"python -m cifar_dist.prepare --data.dir {tmp_path}" in dataset
    assert "(train.beton, test.beton missing)" in dataset
    assert "needs the internet" in dataset
    copy = tmp_path / "my copy"
    (missing,) = check(changed(config, data={"dir": tmp_path, "source": copy}), planned).refusals
    assert missing == f"data.source is {copy}, which does not exist here or cannot be read."
    copy.mkdir()
    found = check(changed(config, data={"dir": tmp_path, "source": copy}), planned)
    assert (found.refusals, "internet" in found.warnings[0]) == ([], False)
    assert f"--data.dir {tmp_path} --data.source '{copy}'" in found.warnings[0]


def test_what_the_run_reads(config: Config, planned: Figures, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    runs_that_read = changed(config, model={"weights": nowhere}), changed(config, run={"resume": nowhere})
    texts = [check(run, planned).refusals[0] for run in runs_that_read]
    assert texts == [
        f"{name} is {nowhere}, which does not exist here or cannot be read." for name in ("model.weights", "run.resume")
    ]


# The command


@pytest.mark.parametrize(("arguments", "message"), [
    ((CONFIG, "--gpus", "5"), "multiple of train.micro_batch_size 96 x 5 processes = 480.\n"
                              "Nearest valid choices: train.batch_size 480; or 1 or 2 processes."),
    ((CONFIG, "--nodes", "0"), "nodes is 0; valid: 1 or more."),
    ((CONFIG, "--time-limit", "1h"), "time_limit is 1h; valid are Slurm's forms"),
    ((CONFIG, "--images-per-second", "0"), "images_per_second is 0.0; valid: above 0."),
    ((CONFIG, "--measure", "--images-per-second", "9"), "the training speed has one source"),
    ((CONFIG, "--json", "/nowhere/a.json"), "--json /nowhere/a.json cannot be written: No such file or directory."),
    ((CONFIG, "--train.epoch", "3"), "--train.epochs"),
    ((CONFIG, "--optim.lr", "-1"), "optim.lr is -1.0; valid: above 0"),
    (("/nowhere.yaml",), "/nowhere.yaml: No such file"),
    (("--gpus", "2"), "CONFIG"),
])  # fmt: skip
def test_wrong_arguments_are_refused_without_importing_torch(arguments: tuple[str, ...], message: str) -> None:
    code = (
        f"import sys; sys.argv[1:] = {list(arguments)}\nfrom cifar_dist import plan\ntry:\n    plan.main()\n"
        "finally:\n    print(*(name for name in ('torch', 'numpy', 'ffcv') if name in sys.modules), '.')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=runs.REPOSITORY)
    assert result.returncode == 2
    assert message in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "."
    assert "Traceback" not in result.stderr


def test_command_line_over_file_over_defaults() -> None:
    arguments = parse(["--gpus", "2", CONFIG, "--train.epochs", "3", "--measure", "--nodes=4"])
    assert (arguments.nodes, arguments.gpus, arguments.measure, arguments.config) == (4, 2, True, CONFIG)
    assert (arguments.settings.train.epochs, arguments.settings.train.batch_size) == (3, 192)
    assert arguments.settings.optim.momentum == 0.9
    assert not parse([CONFIG]).measure
    assert parse([CONFIG, "--measure", "True"]).measure
    assert not parse([CONFIG, "--measure", "False", "--gpus", "2"]).measure


@pytest.mark.data
def test_measured_on_a_screen_and_as_json(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = plan(CONFIG, *SETTINGS, "--data.dir", data_dir, "--nodes", "3", "--gpus", "2", "--measure", "--time-limit",
                  "4:00:00", "--json", out)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 110
    assert (
        "devices       6 = 3 x 2 (nodes x devices); batch of 96 = 16 x 6 x 1 (micro-batch x devices x "
        in lines[1] + " "
    )
    text = " ".join(result.stdout.split())
    assert "(measured here, " in text
    assert "6 devices are assumed to be 6 times as fast as one" in text
    values = json.loads(out.read_text())
    assert values.keys() == {
        "model", "params", "precision", "nodes", "world_size", "batch_size", "micro_batch_size", "accumulation",
        "train_n", "steps", "steps_per_epoch", "epochs", "samples_dropped_per_epoch", "low_resolution_steps",
        "learning_rate", "time", "checkpoints_written", "checkpoints_kept", "checkpoint_bytes", "checkpoints_bytes",
        "validations", "val_n", "time_limit", "warnings", "refusals",
    }  # fmt: skip
    assert f"{values['params']:,} parameters" in lines[0]
    time = values["time"]
    assert 0 < time["step_seconds"] < 60
    assert time["train_seconds"] == pytest.approx(24 * time["step_seconds"])
    assert time["peak_memory_bytes"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = plan(CONFIG, "--train.compile", "off", "--measure", "--json", out)
    assert result.returncode == 0, result.stderr
    assert "torch.cuda.max_memory_allocated" in result.stdout
    assert json.loads(out.read_text())["time"]["peak_memory_bytes"] > 10**6


def test_too_little_memory_is_refused_while_measuring(
    config: Config, planned: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(TrainStep, "run", run)
    with pytest.raises(UserError, match=r"the next lower one for train\.batch_size 96 on 3 processes is 8"):
        measure(config, planned)


def test_page_without_a_training_speed(config: Config, planned: Figures) -> None:
    text = page(config, planned, None, Findings(warnings=["look"]))
    assert "time          unknown; give --images-per-second SPEED (per device) or --measure" in text
    assert text.splitlines()[-1] == "warning:      look"
    assert "memory" not in text
    assert text.isascii()
