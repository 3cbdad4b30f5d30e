"""The plan against a real run, its refusals, and its page, figures and picture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist.cli import load_config
from cifar_dist.config import Config
from cifar_dist.distributed import World
from cifar_dist.errors import UserError
from cifar_dist.plan import parse, time_limit_seconds
from cifar_dist.tracking.curves import TRAIN, VALIDATION
from cifar_dist.tracking.schedule_curve import text_curve
from cifar_dist.training import memory, pace
from cifar_dist.training.checkpoint import path_of
from cifar_dist.training.forecast import Forecast, forecast
from cifar_dist.training.objections import Objections, objections
from cifar_dist.training.pace import Pace
from cifar_dist.training.plan_report import figures, page
from cifar_dist.training.precision import NumberFormat
from cifar_dist.training.stepper import Stepper
from tests import runs

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
def planned(config: Config) -> Forecast:
    """For three devices."""
    return forecast(config, 3)


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
def test_agrees_with_a_real_run(planned: Forecast, config: Config, run_dir: Path) -> None:
    summary, alone = runs.summary(run_dir), forecast(config, 1)
    expected = figures(alone, None, Objections(), nodes=1)
    for name in ("steps", "epochs", "params", "train_n", "samples_dropped_per_epoch", "accumulation", "val_n",
                 "batch_size", "micro_batch_size", "model", "world_size", "precision"):  # fmt: skip
        assert expected[name] == summary[name], name
    assert (planned.accumulation, alone.accumulation) == (2, 6)
    records = runs.records(run_dir)
    assert [record["step"] for record in records if "val/accuracy" in record] == alone.validations == [10, 20, 24]
    rates = {record["step"]: record["lr"] for record in records if "lr" in record}
    assert len(rates) == 24
    peak = alone.lr_peaks["SGD"]
    assert {step: peak * alone.lr_shares[step - 1] for step in rates} == pytest.approx(rates)
    for point in expected["learning_rate"].values():
        assert point["SGD"] == pytest.approx(rates[point["step"]])


@pytest.mark.run
@pytest.mark.data
def test_checkpoints_of_a_real_run(planned: Forecast, run_dir: Path) -> None:
    there = sorted((run_dir / "checkpoints").glob("step-*.pt"))
    low, high = planned.checkpoints.kept
    assert low <= len(there) <= high == 3
    assert path_of(run_dir / "checkpoints", 24).stat().st_size == pytest.approx(
        planned.checkpoints.size_bytes, rel=0.01
    )
    assert planned.saves == [7, 14, 21, 24]
    # Steps 10 and 20 are validated and otherwise not saved; that of 10, being the first, is the best for then.
    assert planned.checkpoints.written == (5, 6)
    assert planned.checkpoints.disk_bytes == 4 * planned.checkpoints.size_bytes
    assert sum(path.stat().st_size for path in there) <= planned.checkpoints.disk_bytes


@pytest.mark.run
@pytest.mark.data
def test_time_like_a_real_run(planned: Forecast, run_dir: Path, data_dir: Path) -> None:
    taken, summary = pace.like(run_dir, planned), runs.summary(run_dir)
    # Three devices are taken for three times as fast.
    assert pace.training_seconds(taken, planned) == pytest.approx(summary["train_seconds"] / 3)
    assert taken.startup_seconds == summary["first_step_seconds"]
    result = plan(CONFIG, *SETTINGS, "--data.dir", data_dir, "--like", run_dir, "--time-limit", "10")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert f"time training {pace.clock(summary['train_seconds'])} ({run_dir}: " in text
    assert "time limit 0:10:00, of which 0:0" in text
    assert "are taken for" not in text
    wider = plan(CONFIG, *SETTINGS, "--data.dir", data_dir, "--like", run_dir, "--model.width", "0.125")
    assert wider.returncode == 2
    assert "model.width was 0.0625, is 0.125" in wider.stderr


def test_without_validation() -> None:
    """On all samples nothing is validated, so all is known beforehand."""
    settings = ("--train.epochs", "2", "--train.checkpoint_every_steps", "0", "--model.width", "0.0625")
    alone = load_config(["--config", CONFIG, *settings])
    found = forecast(alone, 1)
    assert (found.schedule.total_steps, found.dropped_per_epoch, found.validations) == (780, 80, [])
    assert (found.checkpoints.written, found.checkpoints.kept) == ((1, 1), (1, 1))
    assert found.checkpoints.disk_bytes == found.checkpoints.size_bytes
    assert (len(found.lr_shares), found.schedule.low_resolution_steps) == (780, 390)
    assert [found.lr_peaks[name] for name in ("SGD", "SGD (biases)", "Muon")] == pytest.approx([0.1, 3.2, 0.03])


# Memory


@pytest.mark.parametrize("settings", [
    ("--optim.name", "sgd", "--model.stem", "strided"),
    ("--optim.name", "muon", "--optim.ema_decay", "0.9", "--train.precision", "bf16"),
    ("--model.name", "inception_v2", "--model.auxiliary", "True", "--augment.low_resolution_share", "0"),
])  # fmt: skip
def test_memory_is_counted_to_the_byte(settings: tuple[str, ...]) -> None:
    """From two and four images follows what a real micro-batch of 24 takes."""
    common = ("--model.width", "0.0625", "--train.batch_size", "48", "--train.micro_batch_size", "24")
    config = load_config(["--config", CONFIG, *common, *settings])
    name = "bf16" if config.train.precision == "bf16" else "fp32"

    def stepper() -> Stepper:
        return Stepper(config, World(0, 1, 0, 1, torch.device("cpu")), NumberFormat(name, "cpu"))  # type: ignore[arg-type]

    found, real = memory.estimate(stepper(), 24, 100), stepper()
    memory.step_peak(real, 24)  # what the first step alone allocates
    assert found.training == memory.step_peak(real, 24)
    trained = sum(parameter.numel() for parameter in real.model.parameters() if parameter.requires_grad)
    fixed = sum(parameter.numel() for parameter in real.model.parameters()) - trained
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in real.model.buffers())
    assert (found.gradients, found.optimizer) == (4 * trained, 4 * trained)
    assert found.parameters == 4 * (trained + fixed) + buffers
    assert bool(found.ema) == (config.optim.ema_decay is not None)
    assert found.activations > 24 * 4 * 3 * 32 * 32
    assert found.evaluation > found.parameters + found.optimizer


def test_allocations_are_seen_to_come_and_go() -> None:
    before = torch.zeros(100)
    books = memory.Allocations([before])
    with books:
        a = torch.ones(1000)
        b = a.view(10, 100)  # no memory of its own
        c = b + 1
        del a, b
        d = c * 2
        del c, d
    assert books.line == [0, 400, 4400, 8400, 4400, 8400, 4400, 400]


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


@pytest.mark.parametrize(("limit", "num", "epochs"), [
    (120 + 20 + 24, 1, 2), (120 + 20 + 23, 2, 2), (120 + 20 + 10, 3, 1), (120 + 20 + 1, 24, 0), (120 + 20, None, 0),
    (60, None, 0),
])  # fmt: skip
def test_allocations_of_a_time_limit(limit: int, num: int | None, epochs: int, planned: Forecast) -> None:
    """24 steps of a second each, after 20 s of start-up in every allocation."""
    found = pace.allocations(Pace(1.0, 1.0, 20.0, ""), planned, limit)
    assert (found.num, found.epochs, found.needed_seconds) == (num, epochs, 44)


def test_low_resolution_has_a_pace_of_its_own(planned: Forecast) -> None:
    assert planned.schedule.low_resolution_steps == 12
    assert pace.training_seconds(Pace(2.0, 1.0, None, ""), planned) == 12 * 1 + 12 * 2
    given = pace.given(32.0, planned)  # a step of 96 images, on three devices
    assert (given.step_seconds, given.small_step_seconds) == (1.0, 1.0)


def test_clock() -> None:
    assert [pace.clock(s) for s in (0.034, 9.94, 59.2, 3600, 90_061)] == [
        "0.034 s", "9.9 s", "0:01:00", "1:00:00", "1-1:01:01"
    ]  # fmt: skip


# What speaks against it


def test_a_sound_run_has_no_objections(planned: Forecast, tmp_path: Path) -> None:
    settings = replace(planned.config, run=replace(planned.config.run, dir=tmp_path / "new" / "run"))
    settings = replace(settings, optim=replace(settings.optim, warmup_min_steps=0))
    sound = replace(planned, config=settings, lr_shares=[0.5, 1.0, 0.0])
    found = objections(sound, Pace(1.0, 1.0, 20.0, ""), 600, 2**30)
    assert (found.refusals, found.warnings) == ([], [])
    notice = "the last 120 s, in which slurm/train.sh ends a run,"
    assert found.fits == f"0:10:00, of which 0:07:16 are left; {notice} are not counted"
    assert not (tmp_path / "new").exists()


def changed(of: Forecast, **sections: dict[str, Any]) -> Forecast:
    parts = {name: replace(getattr(of.config, name), **values) for name, values in sections.items()}
    return replace(of, config=replace(of.config, **parts))


@pytest.mark.parametrize(("limit", "resume", "kind", "message"), [
    (150, "never", "refusals", "One allocation has room for 1 of 2.4 epochs. With --run.name NAME --run.resume auto it "
                               "goes over 3 allocations (2 requeues)"),
    (150, "auto", "warnings", "The run goes over 3 allocations (2 requeues)."),
    (140, "auto", "refusals", "leaves no time for a single step"),
])  # fmt: skip
def test_time_limits_that_are_too_short(limit: int, resume: str, kind: str, message: str, planned: Forecast) -> None:
    resumed = changed(planned, run={"resume": resume, "name": "a"})
    (text,) = (
        t for t in getattr(objections(resumed, Pace(1.0, 1.0, 20.0, ""), limit, None), kind) if "time limit" in t
    )
    assert message in text


def test_a_time_limit_without_a_rate(planned: Forecast) -> None:
    assert "the time limit is not checked, since the time is unknown." in objections(planned, None, 60, None).warnings


def test_too_little_memory(planned: Forecast) -> None:
    (text,) = objections(planned, None, None, planned.memory.peak - 1.0).refusals
    assert text.endswith("Lower eval.batch_size.")
    (text,) = objections(planned, None, None, planned.memory.training - 1.0).refusals
    assert text.endswith("Lower train.micro_batch_size and eval.batch_size.")


def test_no_room_on_the_disk(planned: Forecast, tmp_path: Path) -> None:
    place = changed(planned, run={"dir": tmp_path / "new" / "run"})
    assert objections(place, None, None, None).refusals == []
    huge = replace(place, checkpoints=replace(place.checkpoints, disk_bytes=10**18))
    (text,) = objections(huge, None, None, None).refusals
    assert text.startswith(f"{tmp_path} has ")
    assert "but the checkpoints need 1,000,000,000,000 MB" in text


def test_a_run_directory_that_will_not_do(planned: Forecast, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "file").touch()
    refusals: Callable[[Forecast], list[str]] = lambda of: objections(of, None, None, None).refusals  # noqa: E731
    assert "already holds a run" in refusals(changed(planned, run={"dir": tmp_path / "run"}))[0]
    assert refusals(changed(planned, run={"dir": tmp_path / "run", "resume": "auto"})) == []
    assert "cannot be used" in refusals(changed(planned, run={"dir": tmp_path / "file" / "run"}))[0]


def test_warnings(planned: Forecast, tmp_path: Path) -> None:
    empty = changed(planned, data={"dir": tmp_path})
    dataset, warm_up = sorted(objections(empty, None, None, None).warnings, key=lambda text: "warmup" in text)
    assert f"python -m cifar_dist.prepare --data.dir {tmp_path}" in dataset
    assert "(train.beton, test.beton, manifest.json missing)" in dataset
    assert warm_up.startswith(f"the learning rate rises to {max(planned.lr_shares):.0%} of its peak only")


# The command


@pytest.mark.parametrize(("arguments", "message"), [
    ((CONFIG, "--gpus", "5"), "train.batch_size 128 is no multiple of train.micro_batch_size 64 x 5 processes = 320.\n"
                              "Nearest valid choices: train.batch_size 320; or 1 or 2 processes."),
    ((CONFIG, "--nodes", "0"), "nodes is 0; valid: 1 or more."),
    ((CONFIG, "--time-limit", "1h"), "time_limit is 1h; valid are Slurm's forms"),
    ((CONFIG, "--images-per-second", "0"), "images_per_second is 0.0; valid: above 0."),
    ((CONFIG, "--measure", "--like", "runs/a"), "the time comes from one source"),
    ((CONFIG, "--picture", "/nowhere/a.png"), "the folder /nowhere does not exist"),
    ((CONFIG, "--train.epoch", "3"), "--train.epochs"),
    ((CONFIG, "--optim.lr", "-1"), "optim.lr is -1.0; valid: above 0."),
    (("/nowhere.yaml",), "/nowhere.yaml: No such file"),
    (("--gpus", "2"), "CONFIG"),
])  # fmt: skip
def test_mistakes_are_answered_without_torch(arguments: tuple[str, ...], message: str) -> None:
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
    assert (arguments.nodes, arguments.gpus, arguments.measure, arguments.config) == (4, 2, True, Path(CONFIG))
    assert (arguments.settings.train.epochs, arguments.settings.train.batch_size) == (3, 128)
    assert arguments.settings.optim.momentum == 0.9
    assert not parse([CONFIG, "--measure", "False"]).measure


@pytest.mark.data
def test_measured_with_figures_and_picture(data_dir: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = plan(CONFIG, *SETTINGS, "--data.dir", data_dir, "--nodes", "3", "--gpus", "2", "--measure", "--time-limit",
                  "4:00:00", "--json", out, "--picture", picture)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 115
    assert "devices       6 (3 nodes x 2); batch of 96 = 16 x 6 x 1 (micro-batch x devices x accumulation)" in lines
    text = " ".join(result.stdout.split())
    assert "(an estimate)" in text
    assert "(measured here, " in text
    assert "6 devices are taken for 6 times as fast as one" in text
    values = json.loads(out.read_text())
    assert values.keys() == {
        "model", "params", "precision", "nodes", "world_size", "batch_size", "micro_batch_size", "accumulation",
        "train_n", "steps", "steps_per_epoch", "epochs", "samples_dropped_per_epoch", "low_resolution_steps",
        "learning_rate", "memory_bytes", "time", "checkpoints", "validations", "val_n", "warnings", "refusals",
    }  # fmt: skip
    assert f"{values['params']:,} parameters" in lines[0]
    time = values["time"]
    assert 0 < time["step_seconds"] < 60
    assert 0 < time["low_resolution_step_seconds"] < 60
    assert time["train_seconds"] == pytest.approx(12 * (time["step_seconds"] + time["low_resolution_step_seconds"]))
    assert values["memory_bytes"]["peak"] >= values["memory_bytes"]["training"]
    check_picture(picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def check_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1320, 660)
        pixels = np.asarray(image.convert("RGB"))
    for colour, least in ((TRAIN, 500), (VALIDATION, 50)):
        wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == wanted).all(axis=-1).sum() > least
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_page_says_what_is_not_known(planned: Forecast) -> None:
    text = page(planned, None, Objections(warnings=["look"]), nodes=1)
    assert "time          unknown; give --images-per-second RATE (per device), --like runs/NAME, or --measure" in text
    assert text.splitlines()[-1] == "warning:      look"
    assert page(planned, None, Objections(), nodes=1, plain=True).isascii()


def test_text_curve() -> None:
    assert text_curve([0.0, 0.25, 0.5, 1.0], width=4, height=2) == ["   █", " ▄██"]
    assert text_curve([0.0, 0.25, 0.5, 1.0], width=4, height=2, plain=True) == ["   #", " ###"]
    assert text_curve([0.5, 1.0], width=4, height=1) == ["▄▄██"]
    assert text_curve([0.0, 1.0, 0.0, 0.5], width=2, height=1) == ["█▄"]  # the largest of each column
