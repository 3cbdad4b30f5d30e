"""Both networks, with auxiliary heads, learn 512 images by heart: forward, backward and the optimizer do their work.

And the model of the last checkpoint, scored as runs score, recognises them: whatever scoring does otherwise than
training, such as batch norms in evaluation mode, fits together.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar_dist import cli
from cifar_dist.data.dataset import read_split
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World
from cifar_dist.training import checkpoint
from cifar_dist.training.evaluation import Score
from cifar_dist.training.precision import choose_precision
from cifar_dist.training.run_directory import newest_valid
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer
from tests.support import runs

OPTIONS = ("--config", str(runs.REPOSITORY / "configs/quickstart.yaml"), "--data.train_on", "all", "--data.subset",
           "512", "--train.epochs", "24", "--train.log_every_steps", "16", "--train.batch_size", "32",
           "--train.micro_batch_size", "32", "--model.width", "0.25", "--model.auxiliary", "True",
           "--augment.flip", "none", "--augment.translate", "0", "--augment.low_resolution_share", "0",
           "--eval.every_epochs", "0", "--eval.tta", "none", "--eval.bn_samples", "512", "--eval.test_subset", "500",
           "--track.wandb", "disabled")  # fmt: skip


@pytest.mark.run
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("inception_v1", "auto"),  # bf16, or fp32 on processors for which bf16 takes minutes
        pytest.param("inception_v2", "auto", marks=pytest.mark.slow),
        *(pytest.param(name, "fp32", marks=(pytest.mark.slow, pytest.mark.long)) for name in
          ("inception_v1", "inception_v2")),
    ],
)  # fmt: skip
def test_512_images_are_learned(name: str, precision: str, data_dir: Path, tmp_path: Path) -> None:
    runs.run(1, *OPTIONS, "--model.name", name, "--train.precision", precision, "--data.dir", data_dir,
             "--run.dir", tmp_path / "run")  # fmt: skip
    records = runs.records(tmp_path / "run")
    epochs = [record["train/accuracy"] for record in records if "train/accuracy" in record]
    assert len(epochs) == 24  # one line an epoch
    assert epochs[0] < 0.5
    assert epochs[-1] >= 0.99  # all but 5 at most: rounding, thus the processor, decides on the last ones
    learned = score_of_training_images(tmp_path / "run", data_dir)
    assert learned.n == 512
    assert learned.accuracy > 0.95, learned


def score_of_training_images(run_dir: Path, data_dir: Path) -> Score:
    """Of the model as the last checkpoint of the run has it, recalibrated at its end, by the trainer's own scoring."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    config = cli.load_config(["--config", str(run_dir / "config.yaml")])
    train_step = TrainStep(config, world, choose_precision(config.train.precision, world.device))
    found = newest_valid(run_dir / "checkpoints", config, print)
    assert found is not None
    split = read_split(config.data, data_dir, world)
    with BetonLoader(data_dir / "train.beton", world.device) as loader:
        trainer = Trainer(config, train_step, split, loader, run_dir / "checkpoints")
        trainer.restore(checkpoint.decode(found[1], str(found[0])), str(found[0]))
        return trainer.evaluator.score(loader, split.train)
