"""Single optimizer steps on real images, in every number format, eager and traced for compilation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar_dist.config import AugmentConfig, Config, ModelConfig, OptimConfig, PrecisionName, TrainConfig
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.distributed import World
from cifar_dist.errors import CheckpointError
from cifar_dist.training import checkpoint
from cifar_dist.training.metrics import Metrics, Window
from cifar_dist.training.precision import choose_precision
from cifar_dist.training.schedule import Step
from cifar_dist.training.train_step import TrainStep

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
TINY = Config(
    model=ModelConfig(stem="strided", width=0.125, dropout=0.1),
    train=TrainConfig(batch_size=32, micro_batch_size=16, precision="fp32"),
    optim=OptimConfig(name="sgd", weight_decay=0.0),
    augment=AugmentConfig(cutout=8),
)


@pytest.fixture(scope="module")
def batches(data_dir: Path) -> list[tuple[int, Batch]]:
    """Four micro-batches of 16 images in epoch 0."""
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        return [(0, batch) for batch in loader.read(np.arange(64), 16)]


def train_step_of(config: Config) -> TrainStep:
    train_step = TrainStep(config, ALONE, choose_precision(config.train.precision, ALONE.device))
    train_step.prepare()
    return train_step


def two_steps(
    train_step: TrainStep, batches: list[tuple[int, Batch]], sides: tuple[int | None, ...] = (None, None)
) -> Window:
    """At four times the peak rates, so that it is 0.05 for SGD: they are for batches of 128, and these are of 32."""
    metrics, supply = Metrics(ALONE), iter(batches)
    for step, side in enumerate(sides):
        train_step.run(Step(step, 4.0, side), supply, metrics)
    assert next(supply, None) is None  # two accumulated micro-batches per step
    return metrics.window()


def parameters(train_step: TrainStep) -> Iterator[torch.Tensor]:
    return (parameter.detach().double() for parameter in train_step.model.parameters())


SMALL_FIRST = replace(TINY, augment=AugmentConfig(low_resolution_share=0.5))
MUON = replace(TINY, model=replace(TINY.model, auxiliary=True), optim=OptimConfig(name="muon", muon_lr=0.01))

# Own code; one layer of the network has dropout before its batch norm.
OWN = replace(
    TINY,
    model=ModelConfig(name="tests.unit.models.test_own:plain", dropout=0.2),
    optim=OptimConfig(name="tests.unit.training.test_optim:adamw"),
    augment=AugmentConfig(extra="tests.unit.data.test_augment:Brighten"),
)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp64"])
def test_the_gradient_norm_of_a_logged_step(precision: Any, batches: list[tuple[int, Batch]]) -> None:
    """Before clipping and without the scale of fp16: the first step of SGD moves by lr x (1 + momentum) x gradient."""
    optimizer = replace(TINY.optim, name="sgd", weight_decay=0.0, bias_lr_factor=1.0, grad_clip=None)
    config = replace(TINY, train=replace(TINY.train, precision=precision), optim=optimizer)
    train_step = train_step_of(config)
    before = torch.cat([p.detach().flatten() for p in parameters(train_step)])
    train_step.run(Step(0, 1.0, logged=True), iter(batches), Metrics(ALONE))
    moved = torch.cat([p.detach().flatten() for p in parameters(train_step)]) - before
    peak = train_step.optimizer.param_groups[0]["peak_lr"]
    expected = moved.norm().item() / (peak * (1 + config.optim.momentum))
    assert train_step.figures(1.0)["gradient_norm"] == pytest.approx(expected, rel=1e-4)
    clipped = train_step_of(replace(config, optim=replace(optimizer, grad_clip=expected / 3)))
    clipped.run(Step(0, 1.0, logged=True), iter(batches), Metrics(ALONE))
    assert clipped.figures(1.0)["gradient_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("config", [TINY, MUON, OWN], ids=["sgd", "muon and auxiliary heads", "own"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp64"])
def test_every_number_format_trains(config: Config, precision: PrecisionName, batches: list[tuple[int, Batch]]) -> None:
    reference = train_step_of(replace(config, train=replace(config.train, precision="fp64")))
    train_step = train_step_of(replace(config, train=replace(config.train, precision=precision)))
    expected, window = two_steps(reference, batches), two_steps(train_step, batches)
    assert window.num_samples == 64
    assert window.num_nonfinite == 0
    assert window.loss == pytest.approx(expected.loss, rel=0.02)
    assert {p.dtype for p in train_step.model.parameters()} == {torch.float64 if precision == "fp64" else torch.float32}
    assert all(p.isfinite().all() for p in train_step.model.parameters())


@pytest.mark.parametrize(
    "config", [MUON, SMALL_FIRST, OWN], ids=["muon and auxiliary heads", "sgd and two sizes", "own"]
)
def test_tracing_for_compilation_changes_nothing(
    config: Config, batches: list[tuple[int, Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile with its tracing and its own backward graph, but without minutes of code generation."""
    fp64 = replace(config, model=replace(config.model, dropout=0.0), train=replace(config.train, precision="fp64"))
    eager = train_step_of(fp64)
    torch._dynamo.reset()  # of what other tests have compiled, as the number of compilations is limited
    traced_only = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr("cifar_dist.training.train_step.compile_for_training", lambda f, **_: traced_only(f))
    traced = train_step_of(replace(fp64, train=replace(fp64.train, compile="on")))
    for train_step in (eager, traced):
        two_steps(train_step, batches, (24 if config is SMALL_FIRST else None, None))
    assert traced.model.state_dict().keys() == eager.model.state_dict().keys()
    assert not [name for name in traced.state()["model"] if "_orig_mod" in name]
    largest = max((a - b).abs().max().item() for a, b in zip(parameters(eager), parameters(traced), strict=True))
    assert largest < 1e-12


def test_gradient_is_clipped(batches: list[tuple[int, Batch]]) -> None:
    clip = 1e-3
    train_step = train_step_of(replace(TINY, optim=replace(TINY.optim, grad_clip=clip)))
    before = [p.clone() for p in parameters(train_step)]
    train_step.run(Step(0, 0.5), iter(batches), Metrics(ALONE))
    moved = torch.cat([(a - b).flatten() for a, b in zip(parameters(train_step), before, strict=True)])
    # Nesterov's first step is rate x (1 + momentum) x gradient; the peak rate is for batches of 128.
    assert moved.norm().item() == pytest.approx(0.5 * 0.05 * 32 / 128 * 1.9 * clip, rel=1e-2)


@pytest.mark.parametrize("size", [16, 8])
def test_small_micro_batches_step_like_one_large(size: int, batches: list[tuple[int, Batch]]) -> None:
    """Their losses count by their share. Without batch norm, whose statistics are those of a micro-batch."""
    fp64 = replace(TINY.train, precision="fp64")
    config = replace(TINY, model=replace(TINY.model, norm="none", dropout=0.0))
    images, labels, indices = (torch.cat(parts) for parts in zip(*(batch for _, batch in batches[:2]), strict=True))
    moved = []
    for micro_batch_size in (32, size):
        train_step = train_step_of(replace(config, train=replace(fp64, micro_batch_size=micro_batch_size)))
        before = torch.cat([p.flatten() for p in parameters(train_step)])
        parts = zip(*(torch.split(x, micro_batch_size) for x in (images, labels, indices)), strict=True)
        train_step.run(Step(0, 1.0), iter([(0, Batch(*part)) for part in parts]), Metrics(ALONE))
        moved.append(torch.cat([p.flatten() for p in parameters(train_step)]) - before)
    assert moved[0].norm() > 1e-3
    assert (moved[1] - moved[0]).norm() < 1e-12 * moved[0].norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_by_hand(smoothing: float, batches: list[tuple[int, Batch]]) -> None:
    """Of each target, `smoothing` is spread evenly over the ten classes."""
    config = replace(
        TINY,
        model=replace(TINY.model, dropout=0.0),
        train=replace(TINY.train, precision="fp64"),
        optim=replace(TINY.optim, label_smoothing=smoothing),
    )
    train_step, seen = train_step_of(config), []
    train_step.model.get_submodule("classifier").register_forward_hook(
        lambda *arguments: seen.append(arguments[2].detach())
    )
    metrics = Metrics(ALONE)
    train_step.run(Step(0, 0.0), iter(batches), metrics)
    log_shares = torch.cat(seen).log_softmax(dim=1)
    labels = torch.cat([batch.labels for _, batch in batches[:2]])
    targets = torch.full_like(log_shares, smoothing / 10)
    targets[torch.arange(32), labels] += 1 - smoothing
    window = metrics.window()
    assert window.objective == pytest.approx(-(targets * log_shares).sum(dim=1).mean().item(), rel=1e-8)
    assert window.loss == pytest.approx(-log_shares[torch.arange(32), labels].mean().item(), rel=1e-8)


@pytest.mark.parametrize("config", [TINY, MUON, OWN], ids=["sgd", "muon and auxiliary heads", "own"])
def test_a_restored_step_goes_on_with_the_momentum(config: Config, batches: list[tuple[int, Batch]]) -> None:
    """Bit by bit, from the bytes of a checkpoint."""
    config = replace(config, optim=replace(config.optim, ema_decay=0.5))
    whole, restored = train_step_of(config), train_step_of(config)
    whole.run(Step(0, 1.0), iter(batches[:2]), Metrics(ALONE))
    data = checkpoint.encode(1, whole.state() | {"config": ""})
    restored.restore(checkpoint.decode(data, "it"), "it")
    for train_step in (whole, restored):
        train_step.run(Step(1, 1.0), iter(batches[2:]), Metrics(ALONE))
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(restored), strict=True))
    averages = (train_step.scored_model.parameters() for train_step in (whole, restored))
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_a_scale_that_does_not_help(batches: list[tuple[int, Batch]]) -> None:
    """In fp16 a gradient that is NaN at every scale is noted when the scale has come down to 1, here from 4."""
    train_step = train_step_of(replace(TINY, train=replace(TINY.train, precision="fp16")))
    train_step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_step._network.flat.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[no-untyped-call]
    metrics, before = Metrics(ALONE), list(parameters(train_step))
    for number in range(4):
        train_step.run(Step(number, 1.0), iter(batches[:2]), metrics)
    assert metrics.first_nonfinite() == ("gradient", 3, [0])
    assert metrics.window().num_nonfinite == 2
    assert all(map(torch.equal, before, parameters(train_step)))


def test_moving_average_is_scored(batches: list[tuple[int, Batch]]) -> None:
    """And it has no auxiliary heads."""
    config = replace(TINY, model=replace(TINY.model, auxiliary=True), optim=replace(TINY.optim, ema_decay=0.5))
    train_step = train_step_of(config)
    supply, metrics = iter(batches), Metrics(ALONE)
    start = [p.clone() for p in parameters(train_step)]
    train_step.run(Step(0, 0.2), supply, metrics)
    average = list(train_step.scored_model.parameters())
    assert len(average) < len(start)
    # The decay is 1/10 at first, and it is the start that is decayed.
    for a, b, mean in zip(start, parameters(train_step), average, strict=False):
        assert torch.allclose(mean.double(), 0.1 * a + 0.9 * b, atol=1e-6)


def test_another_precision_cannot_resume() -> None:
    state = train_step_of(TINY).state()
    other = train_step_of(replace(TINY, train=replace(TINY.train, precision="bf16")))
    with pytest.raises(CheckpointError, match="trained in fp32, this run is in bf16"):
        other.restore(state, "x.pt")
