"""Both networks, with auxiliary heads, learn 512 images by heart: forward, backward and the optimizer do their work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs

OPTIONS = ("--config", str(runs.REPOSITORY / "configs/quickstart.yaml"), "--data.train_on", "train", "--data.subset",
           "512", "--train.epochs", "24", "--train.log_every_steps", "16", "--train.batch_size", "32",
           "--train.micro_batch_size", "32", "--model.auxiliary", "True", "--augment.flip", "none",
           "--augment.translate", "0", "--augment.low_resolution_share", "0", "--eval.every_epochs", "0",
           "--eval.tta", "none", "--eval.bn_samples", "512", "--track.wandb", "disabled")  # fmt: skip


@pytest.mark.run
@pytest.mark.data
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["inception_v1", "inception_v2"])
def test_all_of_512_images_are_learned(name: str, precision: str, data_dir: Path, tmp_path: Path) -> None:
    runs.run(1, *OPTIONS, "--model.name", name, "--train.precision", precision, "--data.dir", data_dir,
             "--run.dir", tmp_path / "run")  # fmt: skip
    records = runs.records(tmp_path / "run")
    epochs = [record["train/accuracy"] for record in records if "train/accuracy" in record]
    assert len(epochs) == 24  # one line an epoch
    assert epochs[0] < 0.5
    assert epochs[-1] == 1.0
    assert runs.summary(tmp_path / "run")["train_seconds"] < 180
