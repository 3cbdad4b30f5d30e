"""A whole training, end to end, against its bare step and against torchvision's googlenet with its DataLoader."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy.typing as npt
import torch

from cifar_dist.benchmarks import baselines, networks
from cifar_dist.benchmarks.device import compiles, micro_batches, stems, wait_for
from cifar_dist.benchmarks.measure import Row, Table, calls_in
from cifar_dist.benchmarks.settings import BenchConfig, Stem
from cifar_dist.config import Config, DataConfig, EvalConfig, ModelConfig, TrackConfig, TrainConfig
from cifar_dist.data import beton, dataset
from cifar_dist.data.beton import Images, Labels
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.distributed import World, joined
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.training.memory import blank_batches
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import NumberFormat, number_format, set_backends
from cifar_dist.training.samples import split_of
from cifar_dist.training.schedule import Step
from cifar_dist.training.stepper import Stepper
from cifar_dist.training.trainer import Trainer

WHOLE, MEMORY, BARE = "training, end to end", "the same, images from memory", "bare step"
THEIRS = "torchvision googlenet + DataLoader"


class TimedLoader(BetonLoader):
    """Adds up the seconds for which the training thread waits for batches."""

    waited = 0.0

    def read(self, order: npt.NDArray, batch_size: int) -> Generator[Batch]:  # type: ignore[type-arg]
        reading = super().read(order, batch_size)
        try:
            while True:
                start = time.perf_counter()
                batch = next(reading, None)
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
        finally:
            reading.close()


class Alternation:
    """At each log step of a training, measures the other cases for as many steps: A B C A B C within one run."""

    def __init__(
        self, loader: TimedLoader, tracker: Tracker, device: torch.device, num_steps: int, images: int
    ) -> None:
        self.loader, self.tracker, self.wait = loader, tracker, wait_for(device)
        self.num_steps, self.images = num_steps, images
        self.rates: dict[str, list[float]] = {WHOLE: [], MEMORY: [], BARE: [], THEIRS: []}
        self.waits: list[float] = []
        self.others: dict[str, Callable[[], object]] = {}
        self._started, self._waited = time.perf_counter(), 0.0

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """What the trainer calls; the first window, in which all is compiled, does not count."""
        if "train/loss" not in metrics:
            return
        self.tracker.log(step, metrics)
        seconds = time.perf_counter() - self._started
        warm = step > self.num_steps
        if warm:
            self.rates[WHOLE].append(self.images * self.num_steps / seconds)
            self.waits.append((self.loader.waited - self._waited) / seconds)
        for name, work in self.others.items():
            if isinstance(work, Torchvision):
                work.drain()
            self.wait()
            start = time.perf_counter()
            for _ in range(self.num_steps):
                work()
            self.wait()
            if warm:
                self.rates[name].append(self.images * self.num_steps / (time.perf_counter() - start))
            if isinstance(work, Torchvision):
                time.sleep(0.3)  # its workers fill their queues, and are still then
        self._started, self._waited = time.perf_counter(), self.loader.waited


def measure(config: BenchConfig) -> list[Table]:
    """For each stem and micro-batch, one training of a few seconds; its validations and checkpoints are left out.

    Raises:
        DataError: there is no sound train.beton in `config.data.dir`.
    """
    tables = []
    with joined(config.device) as world:
        formats = number_format(config.precision, world.device)
        set_backends(TrainConfig(), deterministic=False)
        gpu = world.device.type == "cuda"
        arrays = beton.read_arrays(config.data.dir / dataset.TRAIN)  # also checks the file, which FFCV would not
        for stem, num in product(config.stem or stems(config, gpu)[:1], micro_batches(config, gpu)):
            tables.append(_measure(config, stem, num, arrays, world, formats))
    return tables


def _measure(
    config: BenchConfig, stem: Stem, num: int, arrays: tuple[Images, Labels], world: World, formats: NumberFormat
) -> Table:
    compiled = compiles(config, world.device.type == "cuda")
    model = ModelConfig(stem=stem, width=config.width)
    bare = networks.ours(model, num, formats, "default" if compiled else None, muon=True)
    for _ in range(2):  # compiles, and fills caches
        bare.step()
    steps = calls_in(config.seconds, bare.step, wait_for(world.device))
    settings = Config(
        data=DataConfig(dir=config.data.dir, train_on="all"),  # no validation
        model=model,
        train=TrainConfig(
            batch_size=num, micro_batch_size=num, max_steps=steps * (config.repeats + 1), log_every_steps=steps,
            checkpoint_every_steps=0, compile="on" if compiled else "off", precision=formats.name,
        ),
        eval=EvalConfig(every_epochs=0, bn_samples=500, tta="none"),
        track=TrackConfig(wandb="disabled"),
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loader = stack.enter_context(TimedLoader(config.data.dir / dataset.TRAIN, world.device))
        total = settings.train.max_steps or 0
        tracker = stack.enter_context(Tracker(folder, settings.track, {}, total, 0, "bench"))
        alternation = Alternation(loader, tracker, world.device, steps, num)
        if config.width == 1 and stem != "whiten":
            alternation.others[THEIRS] = Torchvision(arrays, stem, num, formats)
        alternation.others |= {MEMORY: _from_memory(settings, world, formats), BARE: bare.step}
        stepper = Stepper(settings, world, formats)
        split = split_of(settings.data, config.data.dir, world)
        Trainer(settings, stepper, split, loader, alternation.report, tracker.progress, folder / "checkpoints").train()
    rows = [Row(name, values) for name, values in alternation.rates.items() if values]
    rows[0].more["% data wait"] = 100 * sum(alternation.waits) / len(alternation.waits)
    notes = [f"{steps} steps a measurement, Muon, a log line after each; {BARE}: forward, backward, optimizer"]
    return Table(f"V1, {stem} stem, micro-batch {num}, {formats.name}", "images/s", rows, BARE, notes=notes)


def _from_memory(settings: Config, world: World, formats: NumberFormat) -> Callable[[], object]:
    """The stepper's own step, with augmentation and metrics, on images that are there already."""
    stepper, metrics = Stepper(settings, world, formats), Metrics(world)
    batches = blank_batches(settings.train.micro_batch_size, world.device)
    return lambda: stepper.step(Step(0, 0.0, None), batches, metrics)


class Torchvision:
    """What people would use instead, as a whole: its network in its memory order, its loader, SGD; a call is a step."""

    def __init__(self, arrays: tuple[Images, Labels], stem: str, num: int, formats: NumberFormat) -> None:
        self.subject, self.formats = networks.theirs(stem, num, formats, channels_last=False), formats
        self.num_workers = min(len(os.sched_getaffinity(0)), 16)
        self.batches = baselines.torchvision_batches(*arrays, num, self.num_workers, formats.device_type == "cuda")

    def drain(self) -> None:
        """Take what the workers have done while others were measured."""
        for _ in range(2 * self.num_workers):
            next(self.batches)

    def __call__(self) -> float:
        images, labels = next(self.batches)
        device, subject = self.formats.device_type, self.subject
        subject.images = images.to(device, self.formats.parameters, non_blocking=True)
        subject.labels = labels.to(device, non_blocking=True)
        return subject.step()
