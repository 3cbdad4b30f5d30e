"""Short trainings on a GPU in which CUDA raises an error at each wait except at log steps.

    python -m tests.support.real_gpu TRAIN.BETON

A step right behind a log step is not watched, since validations and checkpoints come before it, which may wait.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from cifar_dist.config import Config
from cifar_dist.data.loader import BetonLoader
from cifar_dist.training.metrics import Metrics, Window
from cifar_dist.training.precision import Precision
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer
from tests.unit.training.test_device_waits import CONFIGS, GPU, SAMPLES


class WaitsAreErrors(Hooks):
    def after_step(self, step: int) -> None:  # noqa: ARG002
        torch.cuda.set_sync_debug_mode("error")


def let_windows_wait() -> None:
    good = Metrics.window

    def window(self: Metrics) -> Window:
        torch.cuda.set_sync_debug_mode("default")
        return good(self)

    Metrics.window = window  # type: ignore[method-assign]


def train(config: Config, path: Path) -> None:
    train_step = TrainStep(config, GPU, Precision(config.train.precision, "cuda"))  # type: ignore[arg-type]
    with BetonLoader(path, GPU.device) as loader, tempfile.TemporaryDirectory() as folder:
        Trainer(config, train_step, SAMPLES, loader, Path(folder), WaitsAreErrors()).train()


if __name__ == "__main__":
    let_windows_wait()
    for name, config in CONFIGS.items():
        print(name, flush=True)
        train(config, Path(sys.argv[1]))
