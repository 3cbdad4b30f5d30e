"""Part "train": whole training against its step alone, and against torchvision's googlenet with its DataLoader."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar_dist.benchmarks import baselines
from cifar_dist.benchmarks.baselines import TorchvisionLoader
from cifar_dist.benchmarks.measure import Row, Table, calls_in, wait_for
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.config import NUM_TRAIN, Config, DataConfig, EvalConfig, ModelConfig, TrackConfig, TrainConfig
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.data.prepare import beton
from cifar_dist.data.prepare.beton import Images, Labels
from cifar_dist.distributed import World, init_distributed
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import Precision, choose_precision, set_backends
from cifar_dist.training.schedule import Step
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer

TRAINING, IN_MEMORY, BARE = "training, end to end", "the same, images from memory", "bare step"
TORCHVISION = "torchvision googlenet + DataLoader"


def measure(config: BenchConfig) -> list[Table]:
    """One short training per stem and micro-batch. `config.data.dir` must have been verified."""
    with init_distributed(config.device) as world:
        precision = choose_precision(config.precision, world.device)
        set_backends(TrainConfig(), False, world.device)
        on_gpu = world.device.type == "cuda"
        arrays = beton.read_arrays(config.data.dir / "train.beton")
        settings = product(config.stem or config.stems(on_gpu)[:1], config.micro_batch_sizes(on_gpu))
        return [_measure(config, stem, num, arrays, world, precision) for stem, num in settings]


def _measure(
    config: BenchConfig, stem: Stem, num: int, arrays: tuple[Images, Labels], world: World, precision: Precision
) -> Table:
    """Train for `config.repeats` windows and one before them, in which everything is compiled."""
    compiled = config.compiles(world.device.type == "cuda")
    model = ModelConfig(stem=stem, width=config.width)
    bare = baselines.project_step(model, num, precision, "default" if compiled else None, muon=True)
    for _ in range(2):  # compiles, and fills caches
        bare()
    window = calls_in(config.seconds, bare, wait_for(world.device))
    total = window * (config.repeats + 1)
    settings = Config(
        data=DataConfig(dir=config.data.dir, train_on="all"),  # no validation
        model=model,
        train=TrainConfig(
            batch_size=num, micro_batch_size=num, max_steps=total, log_every_steps=window, checkpoint_every_steps=0,
            compile="on" if compiled else "off", precision=precision.name,
        ),
        eval=EvalConfig(every_epochs=0, bn_samples=500, tta="none"),
        track=TrackConfig(wandb="disabled"),
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loader = stack.enter_context(_TimedLoader(config.data.dir / "train.beton", world.device))
        tracker = stack.enter_context(Tracker(folder, settings.track, {}, total, 0, "bench"))
        others: dict[str, Callable[[], object]] = {IN_MEMORY: _step_in_memory(settings, world, precision), BARE: bare}
        if baselines.has_torchvision_counterpart(stem, config.width):
            others[TORCHVISION] = _Torchvision(arrays, stem, num, precision)
        hooks = _Interleaved(loader, tracker, wait_for(world.device), window, num, others)
        split = Split(np.arange(NUM_TRAIN), np.arange(0))
        train_step = TrainStep(settings, world, precision)
        Trainer(settings, train_step, split, loader, folder / "checkpoints", hooks).train()
    rows = [Row(name, values) for name, values in hooks.rates.items()]
    rows[0].more["% data wait"] = 100 * sum(hooks.waits) / len(hooks.waits)
    notes = [f"{window} steps per measurement, Muon, a log line after each; {BARE}: forward, backward, optimizer"]
    return Table(f"V1, {stem} stem, micro-batch {num}, {precision.name}", "images/s", rows, BARE, notes=notes)


class _TimedLoader(BetonLoader):
    """Sums up the seconds for which the training thread waits for batches."""

    waited_s = 0.0

    def read(self, order: npt.NDArray[np.int64], batch_size: int) -> Generator[Batch]:
        reading = super().read(order, batch_size)
        while True:
            start = time.perf_counter()
            batch = next(reading, None)
            self.waited_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch


class _Torchvision:
    """A training step of torchvision's googlenet with its DataLoader, in NCHW order, with SGD."""

    def __init__(self, arrays: tuple[Images, Labels], stem: str, num: int, precision: Precision) -> None:
        self.step, self.precision = baselines.torchvision_step(stem, num, precision), precision
        num_workers = min(len(os.sched_getaffinity(0)), 16)
        self.loader = TorchvisionLoader(arrays, num, num_workers, pin_memory=precision.device_type == "cuda")

    def __call__(self) -> None:
        images, labels = next(self.loader)
        device = self.precision.device_type
        self.step.images = images.to(device, self.precision.parameters, non_blocking=True)
        self.step.labels = labels.to(device, non_blocking=True)
        self.step()


def _step_in_memory(settings: Config, world: World, precision: Precision) -> Callable[[], object]:
    """The whole train step, with augmentation and metrics, on images in memory."""
    train_step, metrics = TrainStep(settings, world, precision), Metrics(world)
    batches = baselines.blank_batches(settings.train.micro_batch_size, world.device)
    return lambda: train_step.run(Step(0, 0.0, None), batches, metrics)


@dataclass
class _Interleaved(Hooks):
    """At each log step of a training, measures the other cases for as many steps: A B C A B C.

    Args:
        wait: waits for the device.
        window: steps between two log steps. The first window, in which everything is compiled, does not count.
        num_images: per step.
        others: name and step of the other cases.
        rates: images/s of each case, one per window.
        waits: fraction of the training time for which the training thread waited for data, one per window.
    """

    loader: _TimedLoader
    tracker: Tracker
    wait: Callable[[], None]
    window: int
    num_images: int
    others: dict[str, Callable[[], object]]
    rates: dict[str, list[float]] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started, self._waited_s = time.perf_counter(), 0.0

    def after_step(self, step: int) -> None:
        self.tracker.progress(step)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tracker.log_metrics(step, metrics)
        seconds = {TRAINING: time.perf_counter() - self._started}
        waited_s = self.loader.waited_s - self._waited_s
        for name, work in self.others.items():
            if isinstance(work, _Torchvision):
                work.loader.drain()
            self.wait()
            start = time.perf_counter()
            for _ in range(self.window):
                work()
            self.wait()
            seconds[name] = time.perf_counter() - start
            if isinstance(work, _Torchvision):
                time.sleep(0.3)  # until its workers have filled their queues and are idle
        if step > self.window:
            for name, value in seconds.items():
                self.rates.setdefault(name, []).append(self.num_images * self.window / value)
            self.waits.append(waited_s / seconds[TRAINING])
        self._started, self._waited_s = time.perf_counter(), self.loader.waited_s
