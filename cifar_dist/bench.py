"""Measure, on this machine: `python -m cifar_dist.bench loader`, FFCV's way of a batch against torchvision's."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cifar_dist import cli, errors, files

if TYPE_CHECKING:
    from cifar_dist.data.beton import Images, Labels
    from cifar_dist.data.loader import BetonLoader
    from cifar_dist.data.order import Indices

Pipeline = Callable[[], int]  # runs once and returns how many images went through

READ, AUGMENTED, TORCHVISION = "beton to uint8", "beton, augmented, float32", "torchvision"


@dataclass(frozen=True)
class DataPlace:
    dir: Path = Path("data")
    """Holds the prepared train.beton."""


@dataclass(frozen=True)
class BenchConfig:
    what: tyro.conf.Positional[Literal["loader"]]
    """loader: images per second of one core, from the file to the augmented batch."""
    data: DataPlace = field(default_factory=DataPlace)
    num_images: int = 300_000
    """Images per measurement of FFCV's pipelines."""
    num_torchvision: int = 3_000
    """Images per measurement of torchvision's pipeline."""
    batch_size: int = 250
    """Images per batch, of all pipelines."""
    repeats: int = 5
    """Measurements of each pipeline, taken in turn."""
    json: Path | None = None
    """Write the figures to this file too."""


@dataclass(frozen=True)
class Result:
    """One pipeline's measurements; `ratio` is that of the medians to torchvision's. `core_share` is the part of the
    core's time that this process got: well below 1, other processes were at work and the rates are too low."""

    name: str
    num_images: int
    images_per_second: list[float]
    core_share: list[float]
    median: float
    ratio: float


def main() -> None:
    """Measure what the command line names and print a table."""
    config = cli.parse(BenchConfig, sys.argv[1:], "bench", description="Measure throughput on this machine.")
    with errors.reported():
        _validate(config)
        report = {"loader": bench_loader}[config.what](config)
        print(_table(report))
        if config.json is not None:
            try:
                files.write_text_atomic(config.json, json.dumps(report, indent=2) + "\n")
            except OSError as error:
                raise errors.UserError(f"json {config.json} cannot be written: {error.strerror}.") from None


def _validate(config: BenchConfig) -> None:
    for name in ("num_images", "num_torchvision", "batch_size", "repeats"):
        if getattr(config, name) < 1:
            raise errors.UserError(f"{name} is {getattr(config, name)}; valid: 1 or more.")
    if config.json is not None and not config.json.parent.is_dir():  # said now, not after minutes of measuring
        raise errors.UserError(f"json {config.json}: the folder {config.json.parent} does not exist.")


def measure(pipelines: Mapping[str, Pipeline], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(images per second, CPU seconds per second) of each pipeline, `repeats` times in turn.

    In turn, so that a slow spell of the machine meets them all.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, pipeline in pipelines.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            num_images = pipeline()
            cpu_seconds, seconds = time.process_time() - cpu_start, time.perf_counter() - start
            measured[name].append((num_images / seconds, cpu_seconds / seconds))
    return measured


def bench_loader(config: BenchConfig) -> dict[str, Any]:
    """Measure reading, reading with augmentation, and torchvision's way, all on one processor of this process.

    Raises:
        DataError: there is no sound train.beton in `config.data.dir`.
    """
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})  # before torch and numba count the processors for their thread pools
    from cifar_dist.data import beton, dataset

    path = config.data.dir / dataset.TRAIN
    images, labels = beton.read_arrays(path)  # also checks the file, which FFCV would not
    import torch

    from cifar_dist.data.loader import BetonLoader

    torch.set_num_threads(1)
    start = time.perf_counter()
    with BetonLoader(path, torch.device("cpu")) as loader:
        next(iter(_read(loader, len(labels), config.batch_size, config.batch_size)))
        first_batch_seconds = time.perf_counter() - start
        pipelines = {
            READ: lambda: _read_all(loader, len(labels), config),
            AUGMENTED: lambda: _augment_all(loader, len(labels), config),
            TORCHVISION: _torchvision_pipeline(images, labels, config),
        }
        numbers = {name: pipeline() for name, pipeline in pipelines.items()}  # a round to warm up
        measured = measure(pipelines, config.repeats)
    medians = {name: statistics.median(rate for rate, _ in values) for name, values in measured.items()}
    results = []
    for name, values in measured.items():
        rates, shares = ([value[k] for value in values] for k in range(2))
        results.append(Result(name, numbers[name], rates, shares, medians[name], medians[name] / medians[TORCHVISION]))
    settings = {"cpu": cpu, "batch_size": config.batch_size, "repeats": config.repeats}
    return _header() | settings | {
        "first_batch_seconds": first_batch_seconds, "results": [asdict(result) for result in results]
    }  # fmt: skip


def _read(loader: BetonLoader, num_samples: int, num_images: int, batch_size: int) -> Iterator[tuple[int, Any]]:
    """(epoch, batch) in the shuffled order of training, over as many epochs as `num_images` take."""
    import numpy as np

    from cifar_dist.data.order import Order

    samples: Indices = np.arange(num_samples)
    order = Order(samples, batch_size=1, seed=0)
    for epoch in range(-(-num_images // num_samples)):
        for batch in loader.read(order.epoch(epoch)[: num_images - epoch * num_samples], batch_size):
            yield epoch, batch


def _read_all(loader: BetonLoader, num_samples: int, config: BenchConfig) -> int:
    return sum(len(batch.labels) for _, batch in _read(loader, num_samples, config.num_images, config.batch_size))


def _augment_all(loader: BetonLoader, num_samples: int, config: BenchConfig) -> int:
    import torch

    from cifar_dist.config import AugmentConfig
    from cifar_dist.data import augment

    settings, done = AugmentConfig(), 0
    for epoch, batch in _read(loader, num_samples, config.num_images, config.batch_size):
        draws = augment.draw(batch.indices, seed=0, epoch=epoch, config=settings)
        done += len(augment.apply(batch.images, draws, settings.cutout, torch.float32))
    return done


def _torchvision_pipeline(images: Images, labels: Labels, config: BenchConfig) -> Pipeline:
    """What most CIFAR-10 code does: CIFAR10's own __getitem__, transforms per image, torch's DataLoader."""
    import torch
    from torchvision import datasets, transforms

    from cifar_dist.data.augment import MEAN, STD

    class InMemory(datasets.CIFAR10):  # type: ignore[misc]
        """CIFAR10 over arrays that are already here, in place of its own files."""

        def __init__(self) -> None:
            normalize = transforms.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD])
            augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
            compose = transforms.Compose([*augmentation, transforms.ToTensor(), normalize])
            datasets.VisionDataset.__init__(self, root="", transform=compose)
            self.data, self.targets = images, labels.tolist()

    dataset = InMemory()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = shuffled[: config.num_torchvision]
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset, config.batch_size, sampler=sampler, num_workers=0
    )
    return lambda: sum(len(batch) for batch, _ in loader)


def _header() -> dict[str, Any]:
    import torch

    from cifar_dist.distributed import World
    from cifar_dist.training import summary

    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": summary.device_names(World(0, 1, 0, 1, torch.device("cpu")))[0],
        "versions": summary.versions(),
    }


def _table(report: Mapping[str, Any]) -> str:
    lines = [
        report["command"],
        f"{report['date']}, one core of {report['hardware']}",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"batches of {report['batch_size']}, {report['repeats']} measurements of each in turn; "
        f"first batch after {report['first_batch_seconds']:.1f} s",
        "",
        f"{'images/s of one core':<28}{'median':>10}{'min..max':>22}{'x torchvision':>15}{'core share':>12}",
    ]
    for result in report["results"]:
        rates = result["images_per_second"]
        spread = f"{min(rates):,.0f}..{max(rates):,.0f}"
        lines.append(
            f"{result['name']:<28}{result['median']:>10,.0f}{spread:>22}{result['ratio']:>15.1f}"
            f"{statistics.median(result['core_share']):>12.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
