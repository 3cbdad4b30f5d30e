"""Compiled training: one graph each for augmentation and network, compiled before the first step and never again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters

from cifar_dist import distributed
from cifar_dist.config import AugmentConfig, Config, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.distributed import World
from cifar_dist.models import architectures
from cifar_dist.models.inception import Inception
from cifar_dist.phase import SLOW_S, VERY_SLOW_S, current
from cifar_dist.training import schedule
from cifar_dist.training.precision import Precision
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
# Half the epochs with small images, a validation after each whose last chunk is short, accumulation.
CONFIG = Config(
    model=ModelConfig(stem="strided", width=0.0625, dropout=0.2),
    train=TrainConfig(
        batch_size=16, micro_batch_size=8, epochs=4, precision="bf16", compile="on", log_every_steps=2,
        checkpoint_every_steps=3,
    ),
    optim=OptimConfig(ema_decay=0.9),
    augment=AugmentConfig(low_resolution_share=0.5),
    eval=EvalConfig(every_epochs=1, batch_size=32, bn_samples=64, tta="flip"),
)  # fmt: skip
SAMPLES = Split(train=np.arange(90), validation=np.arange(200, 250))  # 5 steps an epoch, and a rest


@pytest.fixture(autouse=True)
def _few_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each kind once, and without code generation: it is the tracing that breaks a graph or starts again."""
    traced_only = functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr("cifar_dist.training.train_step.compile_for_training", lambda f, **_: traced_only(f))
    torch._dynamo.reset()
    counters.clear()
    v1: Any = architectures.V1
    v2: Any = architectures.V2
    with (
        torch._dynamo.config.patch(error_on_recompile=False),
        mock.patch.dict(v1, {name: v1[name] for name in ("3a", "pool3", "4a")}, clear=True),
        mock.patch.dict(v2, {name: v2[name] for name in ("3a", "3c", "5b")}, clear=True),
    ):
        yield


def trainer_of(config: Config, loader: BetonLoader, directory: Path) -> Trainer:
    train_step = TrainStep(config, ALONE, Precision("bf16", "cpu"))
    return Trainer(config, train_step, SAMPLES, loader, directory)


def note_after_preparation(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of graphs after the preparation; from then on a recompilation is an error."""
    found, prepare = list[int](), trainer.train_step.prepare

    def prepare_and_note() -> None:
        prepare()
        found.append(num_graphs())
        torch._dynamo.config.error_on_recompile = True  # until the end of the test, by _few_modules

    monkeypatch.setattr(trainer.train_step, "prepare", prepare_and_note)
    return found


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("name", "merge"), [("inception_v1", "off"), ("inception_v2", "on")])
def test_compiled_once(name: Any, merge: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation and network for four sizes: eight graphs, all there before the first step."""
    config = replace(CONFIG, model=replace(CONFIG.model, name=name, merge_1x1=merge))
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        trainer = trainer_of(config, loader, tmp_path)
        train_from_here = note_after_preparation(trainer, monkeypatch)
        trainer.train()
    assert train_from_here == [8]
    assert trainer.progress.step == 20
    assert trainer.progress.last_validation is not None
    assert num_graphs() == 8
    assert not counters["graph_break"]


@pytest.mark.parametrize(("share", "exact_sum"), [(0.0, "on"), (1.0, "off")])
def test_no_gradients_are_exchanged_before_all_is_compiled(
    share: float, exact_sum: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an exchange, which times out, the other ranks would wait for one that compiles for longer."""
    events = list[tuple[str, float]]()
    exchange: Any = distributed._GroupOfOne.allreduce

    def note_compilation(module: Any, _: Any) -> Any:
        events.append(("compilation", current.phase.limit_s))
        return module.forward

    def note_exchange(*arguments: Any) -> Any:
        events.append(("exchange", current.phase.limit_s))
        return exchange(*arguments)

    compiled = functools.partial(torch.compile, backend=note_compilation, dynamic=False)
    monkeypatch.setattr("cifar_dist.training.train_step.compile_for_training", lambda f, **_: compiled(f))
    monkeypatch.setattr(distributed._GroupOfOne, "allreduce", note_exchange)
    config = replace(CONFIG, augment=AugmentConfig(low_resolution_share=share))
    config = replace(config, train=replace(config.train, exact_sum=exact_sum))
    TrainStep(config, ALONE, Precision("bf16", "cpu")).prepare()
    num = 2 * (1 if share == 0 else 3)  # augmentation and network, for each size
    assert events[:num] == [("compilation", VERY_SLOW_S)] * num
    assert set(events[num:]) == {("exchange", SLOW_S)}


def test_a_break_is_seen(monkeypatch: pytest.MonkeyPatch, data_dir: Path, tmp_path: Path) -> None:
    forward = Inception.forward

    def broken(self: Inception, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(Inception, "forward", broken)
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        trainer_of(CONFIG, loader, tmp_path).train_step.prepare()
    assert num_graphs() > 8
    assert counters["graph_break"]


def test_a_recompilation_is_seen(monkeypatch: pytest.MonkeyPatch, data_dir: Path, tmp_path: Path) -> None:
    """Images of a size that the start did not see."""
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        trainer = trainer_of(CONFIG, loader, tmp_path)
        note_after_preparation(trainer, monkeypatch)
        monkeypatch.setattr(schedule, "LOW_RESOLUTIONS", (20, 24, 26))
        with pytest.raises(RecompileError):
            trainer.train()
