"""The training loop in this process: learning rates, validation, retained checkpoints, and stops."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import Config, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.distributed import World
from cifar_dist.errors import CheckpointError, StopError
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint, evaluation
from cifar_dist.training.evaluation import Evaluator
from cifar_dist.training.precision import Precision
from cifar_dist.training.run_directory import newest_valid
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer
from tests.support import runs

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SAMPLES = Split(train=np.arange(24), validation=np.arange(200, 210))
# Four epochs of two steps, each with a validation and a checkpoint.
FOUR_EPOCHS = Config(
    model=ModelConfig(stem="strided", width=0.0625),
    train=TrainConfig(
        epochs=4, batch_size=12, micro_batch_size=12, precision="fp32", log_every_steps=1, checkpoint_every_steps=2,
        keep_checkpoints=1,
    ),
    optim=OptimConfig(name="sgd", lr=0.05, warmup_share=0.25),
    eval=EvalConfig(every_epochs=1, batch_size=12, bn_samples=24, tta="none"),
)  # fmt: skip


class KilledError(Exception):
    """Ends the training loop as a lost node does."""


class Seen(Hooks):
    """What a trainer reports, and its scores, which are given beforehand: tenths of ten validation images."""

    def __init__(self, *tenths: int) -> None:
        self.tenths = iter(tenths)
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.killed_after: int | None = None

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.reports.append((step, dict(metrics)))

    def after_step(self, step: int) -> None:
        if step == self.killed_after:
            raise KilledError

    def score(self, *_: Any) -> evaluation.Score:
        right = next(self.tenths)
        confusion = [[0] * 10 for _ in range(10)]
        confusion[0][:2] = right, 10 - right
        return evaluation.Score(10, 1.0, confusion, None, torch.zeros(10, 3, dtype=torch.int64))


@pytest.fixture(scope="module")
def loader(data_dir: Path) -> Iterator[BetonLoader]:
    with BetonLoader(data_dir / "train.beton", ALONE.device) as opened:
        yield opened


def trainer_of(
    seen: Seen, loader: BetonLoader, directory: Path, monkeypatch: pytest.MonkeyPatch, config: Config = FOUR_EPOCHS
) -> Trainer:
    train_step = TrainStep(config, ALONE, Precision("fp32", "cpu"))
    trainer = Trainer(config, train_step, SAMPLES, loader, directory, seen)
    monkeypatch.setattr(Evaluator, "score", seen.score)
    return trainer


def validations(seen: Seen) -> list[tuple[int, float]]:
    return [(step, figures["val/accuracy"]) for step, figures in seen.reports if "val/accuracy" in figures]


def test_the_newest_checkpoint_and_the_best_stay(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(3, 5, 4, 2)
    trainer = trainer_of(seen, loader, tmp_path, monkeypatch)
    trainer.train()
    assert validations(seen) == [(2, 0.3), (4, 0.5), (6, 0.4), (8, 0.2)]
    assert (trainer.progress.best_step, trainer.progress.best_accuracy) == (4, 0.5)
    assert checkpoint.all_steps(tmp_path) == [4, 8]
    assert checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(tmp_path, 8)), "it")["best"] == [4, 0.5]


def test_the_best_checkpoint_is_kept_over_a_restart(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 7, resumed from step 6; the best validation of both starts is that of the first."""
    first, second = Seen(3, 5, 4), Seen(2)
    first.killed_after = 7
    with pytest.raises(KilledError):
        trainer_of(first, loader, tmp_path, monkeypatch).train()
    assert checkpoint.all_steps(tmp_path) == [4, 6]
    trainer = trainer_of(second, loader, tmp_path, monkeypatch)
    found = newest_valid(tmp_path, trainer.config, print)
    assert found is not None
    trainer.restore(checkpoint.decode(found[1], "it"), "it")
    assert (trainer.progress.step, trainer.progress.best_step) == (6, 4)
    trainer.train()
    assert validations(second) == [(8, 0.2)]
    assert trainer.progress.best_step == 4
    assert checkpoint.all_steps(tmp_path) == [4, 8]


class Stopped(Seen):
    """Stops after the second step, at which a validation is due."""

    def stop_requested(self, last_step: bool = False) -> Signals | None:  # noqa: ARG002
        self.calls += 1
        return Signals.SIGTERM if self.calls == 2 else None

    calls = 0


def test_a_validation_put_off_by_a_stop_is_done_once(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 2, resumed, killed in step 3, resumed: the second start saves that it has validated."""

    def resumed(seen: Seen) -> Trainer:
        trainer = trainer_of(seen, loader, tmp_path, monkeypatch, config)
        found = newest_valid(tmp_path, trainer.config, print)
        assert found is not None
        trainer.restore(checkpoint.decode(found[1], "it"), "it")
        return trainer

    config = replace(FOUR_EPOCHS, train=replace(FOUR_EPOCHS.train, checkpoint_every_steps=0))
    stopped, killed, last = Stopped(), Seen(0), Seen(3, 4, 5)
    trainer = trainer_of(stopped, loader, tmp_path, monkeypatch, config)
    trainer.progress.best_step, trainer.progress.best_accuracy = 1, 0.1  # so that 0 is not the best
    with pytest.raises(StopError):
        trainer.train()
    killed.killed_after = 3
    with pytest.raises(KilledError):
        resumed(killed).train()
    resumed(last).train()
    assert [validations(seen) for seen in (stopped, killed, last)] == [[], [(2, 0.0)], [(4, 0.3), (6, 0.4), (8, 0.5)]]


def test_a_later_validation_that_is_as_good_is_not_better(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the best stays, and a validation that is the best is saved although no checkpoint is due."""
    seen = Seen(3, 5, 5, 5)
    config = replace(FOUR_EPOCHS, train=replace(FOUR_EPOCHS.train, checkpoint_every_steps=0))
    trainer = trainer_of(seen, loader, tmp_path, monkeypatch, config)
    trainer.train()
    assert trainer.progress.best_step == 4
    assert checkpoint.all_steps(tmp_path) == [4, 8]


def test_each_step_has_its_own_learning_rate(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of warm-up, then six that fall linearly to zero after the last; the peak is for a batch of 128."""
    seen = Seen(1, 1, 1, 1)
    trainer_of(seen, loader, tmp_path, monkeypatch).train()
    rates = {step: figures["lr"] for step, figures in seen.reports if "lr" in figures}
    shares = {1: 1 / 2, 2: 1, 3: 1, 4: 5 / 6, 5: 4 / 6, 6: 3 / 6, 7: 2 / 6, 8: 1 / 6}
    assert rates == pytest.approx({step: 0.05 * 12 / 128 * share for step, share in shares.items()})


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "running" in name or "num_batches" in name]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_what_is_validated_and_saved_has_the_statistics_of_its_weights(
    ema_decay: float | None, loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the model is scored its batch norms were recalibrated, and so is the last checkpoint."""
    config = replace(FOUR_EPOCHS, optim=replace(FOUR_EPOCHS.optim, ema_decay=ema_decay))
    seen = Seen(1, 2, 3, 4)
    trainer = trainer_of(seen, loader, tmp_path, monkeypatch, config)
    compared = 0

    def score(*_: Any) -> evaluation.Score:
        nonlocal compared
        model = trainer.train_step.scored_model
        by_hand = copy.deepcopy(model)
        for buffer in statistics(by_hand):
            buffer.zero_()
        samples = evaluation.bn_samples(SAMPLES, config.eval)
        Evaluator(by_hand, config.eval, trainer.train_step.precision, ALONE).recalibrate(loader, samples)
        for found, expected in zip(statistics(model), statistics(by_hand), strict=True):
            assert torch.equal(found, expected)
        compared += 1
        return seen.score()

    monkeypatch.setattr(Evaluator, "score", score)
    trainer.train()
    assert compared == 4
    state = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(tmp_path, 8)), "it")
    kept = state["model"] if ema_decay is None else state["ema"]
    scored = trainer.train_step.model if ema_decay is None else trainer.train_step.ema
    assert scored is not None
    for name, buffer in scored.named_buffers():
        assert torch.equal(kept[name], buffer), name


def by_hand(trainer: Trainer, state: dict[str, Any], loader: BetonLoader) -> nn.Module:
    """The model in a checkpoint, loaded in the usual way, with statistics computed anew."""
    model: nn.Module = create_model(trainer.config.model)
    model.load_state_dict(state["model"])
    samples = evaluation.bn_samples(SAMPLES, trainer.config.eval)
    Evaluator(model, trainer.config.eval, trainer.train_step.precision, ALONE).recalibrate(loader, samples)
    return model


def test_every_checkpoint_has_the_statistics_of_its_weights(
    loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of an epoch, where reading is interrupted; what is read afterwards does not change."""
    often = replace(FOUR_EPOCHS, train=replace(FOUR_EPOCHS.train, checkpoint_every_steps=1, keep_checkpoints=8))
    trainer = trainer_of(Seen(1, 2, 3, 4), loader, tmp_path / "rarely", monkeypatch)
    trainer.train()
    expected = trainer.metrics.receipt.digests()
    trainer = trainer_of(Seen(1, 2, 3, 4), loader, tmp_path / "often", monkeypatch, often)
    trainer.train()
    assert trainer.metrics.receipt.digests() == expected
    assert checkpoint.all_steps(tmp_path / "often") == [1, 2, 3, 4, 5, 6, 7, 8]
    for step in range(1, 9):
        state = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(tmp_path / "often", step)), "it")
        assert state["statistics"]
        for name, buffer in by_hand(trainer, state, loader).named_buffers():
            assert torch.equal(state["model"][name], buffer), (step, name)


@pytest.mark.parametrize("error", [None, CheckpointError("no space"), RuntimeError("a lost rank")])
def test_a_stopped_run_is_saved_before_its_statistics(
    error: Exception | None, loader: BetonLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again with them, if that works. The first checkpoint says that it has none; the run has not failed."""

    class Stopped(Seen):
        def stop_requested(self, last_step: bool = False) -> Signals | None:  # noqa: ARG002
            return Signals.SIGTERM

    trainer = trainer_of(Stopped(), loader, tmp_path, monkeypatch)
    if error:
        monkeypatch.setattr(Evaluator, "recalibrate", Mock(side_effect=error))
    with pytest.raises(StopError):
        trainer.train()
    state = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(tmp_path, 1)), "it")
    assert state["statistics"] == (error is None)
    if error is None:
        model = by_hand(trainer, state, loader)
        assert all(torch.equal(state["model"][name], buffer) for name, buffer in model.named_buffers())


NOTED = """
import os, signal, sys
from cifar_dist.fault_tolerance import signals
from cifar_dist.errors import StopError
number = signal.Signals[sys.argv[1]]
signals.install_handlers()
try:
    with signals.deferred():
        os.kill(os.getpid(), number)
        print("asked by", signals.requested().name)
except StopError as error:
    print(str(error))
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_in_the_training_loop_is_deferred(name: str) -> None:
    words = [sys.executable, "-c", NOTED, name]
    result = subprocess.run(words, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    asked, stopped, torch_loaded = result.stdout.splitlines()
    assert asked == f"asked by {name}"
    assert stopped.startswith(f"stopped by {name} ")
    assert torch_loaded == "False"
