"""launch/rehearse against the run that it rehearses, which torchrun starts with as many processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import runs

REHEARSE = str(runs.REPOSITORY / "launch/rehearse")
CONFIG = str(runs.REPOSITORY / "configs/quickstart.yaml")
# 128 = 16 x 4 processes x 2; the epoch ends in the middle, with a tail that is dropped.
SETTINGS = (
    "--model.width", "0.0625", "--data.subset", "1000", "--train.batch_size", "128", "--train.micro_batch_size", "16",
    "--train.precision", "fp64", "--eval.tta", "none", "--eval.bn_samples", "500",
    "--eval.test_subset", "500", "--augment.low_resolution_share", "0.25",
)  # fmt: skip


@pytest.mark.run
@pytest.mark.data
def test_rehearsal_equals_the_run(data_dir: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    common = (*SETTINGS, "--data.dir", str(data_dir))
    words = [*runs.ON_ONE_CPU, REHEARSE, "--world-size", "2", CONFIG, "--steps", "12", *common, f"--run.dir={here}"]
    output = runs.finish(runs.start_command(words))
    runs.run(2, "--config", CONFIG, *common, "--train.max_steps", "12", "--track.wandb", "disabled", "--run.dir", there)
    rehearsed, real = runs.summary(here), runs.summary(there)
    assert (real["world_size"], real["accumulation"], real["samples_dropped_per_epoch"]) == (2, 4, 104)
    assert rehearsed["world_size"] * rehearsed["accumulation"] == 8
    assert rehearsed["data_receipt"] == real["data_receipt"]
    assert len(real["data_receipt"]) == 2
    for epoch, digest in enumerate(real["data_receipt"], 1):
        assert output.splitlines()[-2:][epoch - 1].split() == ["epoch", str(epoch), digest]
    assert rehearsed["model_sha256"] == real["model_sha256"]
    assert f"model_sha256 {real['model_sha256']}" in output
    assert not (here / "wandb").exists()
    assert runs.children_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--world-size", "5", CONFIG),
            "multiple of train.micro_batch_size 96 x 5 processes = 480.\n"
            "Nearest valid choices: train.batch_size 480; or 1 or 2 processes.",
        ),
        (("--world-size", "0", CONFIG), "--world-size is '0'"),
        ((CONFIG,), "--world-size is ''"),
        (("--world-size", "2"), "the configuration is missing"),
        (("--world-size=2", CONFIG, "--steps", "0"), "--steps is 0; valid: 1 or more."),
        (("--world-size=2", CONFIG, "--train.epoch", "3"), "--train.epochs"),
        (("--world-size=2", CONFIG, "--config", CONFIG), "--config is set by launch/rehearse"),
        (("--world-size=2", CONFIG, CONFIG), "give one configuration"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    output = runs.finish(runs.start_command([REHEARSE, *arguments], cwd=tmp_path), expected=2)
    assert message in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
