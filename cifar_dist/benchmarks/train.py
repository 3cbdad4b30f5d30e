"""Part "train": whole training against its step alone, and against torchvision's googlenet with its DataLoader."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import BareStep
from cifar_dist.benchmarks.measure import Row, Table, calls_in, seconds_of, torch_as_in_training
from cifar_dist.benchmarks.settings import BenchConfig
from cifar_dist.config import NUM_TRAIN, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.environment import num_processors
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import Precision
from cifar_dist.training.schedule import Step
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer

TRAINING, IN_MEMORY, BARE = "training, end to end", "the same, images from memory", "bare step"
TORCHVISION = "torchvision googlenet + DataLoader"


def measure(config: BenchConfig) -> list[Table]:
    """Train the first stem with the first micro-batch size; measure the other cases at each log step, so interleaved.

    The first log step, before which everything is compiled, does not count. `config.data_dir` must have been verified.
    """
    num, path = config.micro_batch_size[0], config.data_dir / "train.beton"
    model = ModelConfig(stem=config.stem[0], width=config.width)
    with torch_as_in_training(config) as (world, precision), BetonLoader(path, world.device) as loader:
        bare = baselines.project_step(model, num, precision, config.compile == "on", muon=True)
        for _ in range(2):  # compiles
            bare()
        window = calls_in(config.seconds, bare)
        settings = _settings(config, model, precision, window)
        in_memory, sums = TrainStep(settings, world, precision), Metrics(world)
        in_memory.prepare()
        blank = baselines.blank_batches(num, world.device)
        cases: dict[str, Callable[[], object]] = {IN_MEMORY: lambda: in_memory.run(Step(0, 0.0), blank, sums)}
        cases[BARE] = bare
        num_workers = min(num_processors(), 16)
        batches = baselines.torchvision_batches(path, num, num_workers, pin_memory=config.device == "cuda")
        if baselines.has_torchvision_counterpart(model.stem, config.width):
            cases[TORCHVISION] = partial(_step, baselines.torchvision_step(model.stem, num, precision), batches)

        rates: dict[str, list[float]] = {name: [] for name in (TRAINING, *cases)}

        def measure_others(step: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG001
            rates[TRAINING].append(metrics["images_per_second"])  # without the time spent in this function
            for name, work in cases.items():
                with baselines.without_prefetched(batches, num_workers if name == TORCHVISION else 0):
                    rates[name].append(window * num / seconds_of(window, work))

        with tempfile.TemporaryDirectory() as folder:
            split = Split(np.arange(NUM_TRAIN), np.arange(0))
            trainer = Trainer(settings, TrainStep(settings, world, precision), split, loader, Path(folder))
            trainer.hooks.log_metrics = measure_others  # type: ignore[method-assign]
            trainer.train()
    rows = [Row(name, values[1:]) for name, values in rates.items()]
    notes = [f"{window} steps per measurement, Muon; {BARE}: forward, backward, optimizer"]
    return [Table(f"V1, {model.stem} stem, micro-batch {num}, {precision.name}", "images/s", rows, BARE, notes=notes)]


def _settings(config: BenchConfig, model: ModelConfig, precision: Precision, window: int) -> Config:
    """A run without validations that logs `config.repeats` times, and once before, and saves nothing but its end."""
    num = config.micro_batch_size[0]
    return Config(
        data=DataConfig(train_on="all"),
        model=model,
        train=TrainConfig(
            batch_size=num, micro_batch_size=num, max_steps=window * (config.repeats + 1), log_every_steps=window,
            checkpoint_every_steps=0, compile=config.compile, precision=precision.name,
        ),
        eval=EvalConfig(every_epochs=0, bn_samples=500),
    )  # fmt: skip


def _step(step: BareStep, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """A training step on the next of torchvision's batches, in NCHW order."""
    images, labels = next(batches)
    step.images = images.to(step.labels.device, step.precision.parameters, non_blocking=True)
    step.labels = labels.to(step.labels.device, non_blocking=True)
    step()
