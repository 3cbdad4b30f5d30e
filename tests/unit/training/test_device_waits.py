"""Between two log steps nothing waits for the device.

On a CPU nothing waits, but what would make a GPU be waited for shows there, too: whatever reads the numbers in a
tensor. Copies between host and device only show on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_dist.config import Config
from cifar_dist.data.loader import BetonLoader
from cifar_dist.training.precision import Precision
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer
from tests.support.counting import CpuReads, Wait, Waits
from tests.support.real_gpu import ALONE, CONFIGS, SAMPLES, SMALL

pytestmark = pytest.mark.usefixtures("without_kernels")  # which read tensors as arrays; as on a GPU


def waits_of(trainer: Trainer) -> list[Wait]:
    """What waits while `trainer` trains. The count of a moving average's updates is on the CPU always."""
    ema = trainer.train_step.ema
    waits = Waits(*([] if ema is None else [ema.n_averaged]))
    with waits, CpuReads(waits):
        trainer.train()
    # FFCV makes the buffers of a reading as tensors in host memory, and looks at them as arrays.
    return [wait for wait in waits.seen if not (wait.operation == "numpy" and wait.place.startswith("reading"))]


def trainer_of(config: Config, loader: BetonLoader, directory: Path) -> Trainer:
    train_step = TrainStep(config, ALONE, Precision(config.train.precision, "cpu"))  # type: ignore[arg-type]
    return Trainer(config, train_step, SAMPLES, loader, directory)


@pytest.fixture(scope="module")
def loader(data_dir: Path) -> Iterator[BetonLoader]:
    with BetonLoader(data_dir / "train.beton", ALONE.device) as opened:
        yield opened


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_read_at_log_steps_only(name: str, loader: BetonLoader, tmp_path: Path) -> None:
    """The real loop, over an epoch's end, with validations and checkpoints."""
    trainer = trainer_of(CONFIGS[name], loader, tmp_path)
    seen = waits_of(trainer)
    by_place = Counter(wait.place for wait in seen)
    assert by_place.pop("the sums over a log window") == num_read_steps(trainer)
    assert by_place.pop("the update of the weights") == num_log_steps(trainer)  # the gradient norm, after these sums
    elsewhere = {"evaluation", "writing the checkpoint", "building and compiling the network"}
    assert {place.split(",")[0] for place in by_place} <= elsewhere, seen
    assert any(place.startswith("evaluation") for place in by_place)


def test_muon_in_fp16_waits_once_a_step(loader: BetonLoader, tmp_path: Path) -> None:
    """The only wait there is, known: whether gradients are finite decides on the host if Muon steps at all."""
    trainer = trainer_of(replace(SMALL, train=replace(SMALL.train, precision="fp16")), loader, tmp_path)
    in_steps = Counter(wait for wait in waits_of(trainer) if wait.place == "the update of the weights")
    expected = trainer.schedule.total_steps + num_log_steps(trainer)
    assert in_steps == {Wait("_local_scalar_dense", "the update of the weights"): expected}


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "to the host": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("read", READS)
def test_a_wait_in_a_step_is_seen(read: str, loader: BetonLoader, tmp_path: Path) -> None:
    trainer = trainer_of(replace(SMALL, train=replace(SMALL.train, max_steps=2)), loader, tmp_path)
    classifier = trainer.train_step.model.get_submodule("classifier")
    classifier.register_forward_hook(lambda *arguments: (READS[read](arguments[2]), None)[1])
    assert Counter(wait.place for wait in waits_of(trainer))["a forward or backward pass"] >= 2


@pytest.mark.gpu
def test_a_real_gpu_is_waited_for_at_log_steps_only(data_dir: Path) -> None:
    """Elsewhere CUDA itself raises an error."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    words = [sys.executable, "-m", "tests.support.real_gpu", "waits", str(data_dir / "train.beton")]
    subprocess.run(words, cwd=Path(__file__).parents[3], env=environment, check=True)


def num_log_steps(trainer: Trainer) -> int:
    return sum(trainer.schedule.should_log(step) for step in range(1, trainer.schedule.total_steps + 1))


def num_read_steps(trainer: Trainer) -> int:
    """To log, where an epoch ends, and to save."""
    schedule = trainer.schedule
    return sum(schedule.should_read_metrics(step) for step in range(1, schedule.total_steps + 1))
