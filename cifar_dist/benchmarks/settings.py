"""What `python -m cifar_dist.bench` can be told. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cifar_dist.config import Device, Precision
from cifar_dist.errors import UserError

Part = Literal["loader", "augment", "step", "train", "scaling", "startup"]
PARTS: tuple[Part, ...] = ("loader", "augment", "step", "train", "scaling", "startup")
Stem = Literal["cifar", "pooled", "strided", "whiten"]


@dataclass(frozen=True)
class DataPlace:
    dir: Path = Path("data")
    """Holds the prepared dataset."""


@dataclass(frozen=True)
class BenchConfig:
    part: tyro.conf.Positional[Part | Literal["all"]]
    """loader: from the file to batches, against torchvision's DataLoader and FFCV's own augmentation. augment: this
    project's augmentation. step: forward, backward and optimizer against torchvision's googlenet and the limits of the
    device. train: a whole training against its bare step. scaling: 1 to N processes. startup: from torchrun to the
    first step. all: these in turn, each in a process of its own."""
    data: DataPlace = field(default_factory=DataPlace)
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    repeats: int = 5
    """Measurements of each row, taken in turn (A B A B)."""
    seconds: float = 0.5
    """Least length of one measurement."""
    batch_size: int = 250
    """Images per batch of the loaders, all alike."""
    micro_batch_size: tuple[int, ...] = ()
    """Images per forward pass. None given: what suits the device, 128 on CPUs, mostly 512 on GPUs."""
    stem: tuple[Stem, ...] = ()
    """First layers of the networks. None given: strided, on GPUs pooled and cifar."""
    width: float = 1.0
    """Multiplies the channels of the networks of this project; torchvision's are compared at 1 only."""
    precision: Precision | Literal["auto"] = "auto"
    """As train.precision."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Measure what torch.compile makes as well. auto: networks on GPUs only, as on a CPU it takes minutes; the
    augmentation everywhere."""
    limit_minutes: float = 8.0
    """all: what has not been measured by then is left out, and said to be."""
    json: Path | None = None
    """Write the figures to this file too, for `bench compare`."""


@dataclass(frozen=True)
class CompareConfig:
    old: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OLD")]]
    """File that --json wrote."""
    new: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="NEW")]]
    """A later one."""


def as_arguments(config: BenchConfig) -> list[str]:
    """The command line that gives `config`."""
    words = [config.part, "--data.dir", str(config.data.dir)]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in ("part", "data") or value in (None, ()):
            continue
        words += [f"--{item.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def validate(config: BenchConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: names the setting, its value and what would be valid.
    """
    rules = [
        ("repeats", config.repeats, config.repeats >= 1, "1 or more"),
        ("seconds", config.seconds, 0 < config.seconds <= 600, "above 0, at most 600"),
        ("batch_size", config.batch_size, 1 <= config.batch_size <= 10_000, "1 to 10000"),
        ("micro_batch_size", config.micro_batch_size, all(2 <= n <= 16_384 for n in config.micro_batch_size),
         "2 to 16384"),
        ("limit_minutes", config.limit_minutes, config.limit_minutes > 0, "above 0"),
        ("width", config.width, 0 < config.width <= 16, "above 0, at most 16"),
    ]  # fmt: skip
    for name, value, valid, expected in rules:
        if not valid:
            raise UserError(f"{name} is {value}; valid: {expected}.")
    if config.json is not None and not config.json.parent.is_dir():  # said now, not after minutes of measuring
        raise UserError(f"json {config.json}: the folder {config.json.parent} does not exist.")
