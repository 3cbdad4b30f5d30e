"""Short trainings on a GPU, where CUDA raises an error at each wait but at log steps: `-m tests.real_gpu TRAIN.BETON`.

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
from cifar_dist.training.precision import NumberFormat
from cifar_dist.training.stepper import Stepper
from cifar_dist.training.trainer import Trainer
from tests.test_waits import CONFIGS, GPU, SAMPLES


def watch(_: int) -> None:
    torch.cuda.set_sync_debug_mode("error")


def let_windows_wait() -> None:
    good = Metrics.window

    def window(self: Metrics) -> Window:
        torch.cuda.set_sync_debug_mode("default")
        return good(self)

    Metrics.window = window  # type: ignore[method-assign]


def train(config: Config, path: Path) -> None:
    stepper = Stepper(config, GPU, NumberFormat(config.train.precision, "cuda"))  # type: ignore[arg-type]
    with BetonLoader(path, GPU.device) as loader, tempfile.TemporaryDirectory() as folder:
        Trainer(config, stepper, SAMPLES, loader, lambda *_: None, watch, Path(folder)).train()


if __name__ == "__main__":
    let_windows_wait()
    for name, config in CONFIGS.items():
        print(name, flush=True)
        train(config, Path(sys.argv[1]))
