"""Arguments of `python -m cifar_dist.bench`. Does not import torch, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cifar_dist.config import Device, PrecisionName, Range
from cifar_dist.errors import UserError

Part = Literal["loader", "step", "train", "scaling"]
PARTS: tuple[Part, ...] = ("loader", "step", "train", "scaling")
Stem = Literal["cifar", "pooled", "strided", "whiten"]
_RANGES = {
    "repeats": Range(min=1), "seconds": Range(above=0, max=600), "batch_size": Range(min=1, max=10_000),
    "micro_batch_size": Range(min=2, max=16_384), "limit_minutes": Range(above=0), "width": Range(above=0, max=16),
}  # fmt: skip


@dataclass(frozen=True)
class DataFolder:
    dir: Path = Path("data")
    """Holds the prepared dataset."""


@dataclass(frozen=True)
class BenchConfig:
    part: tyro.conf.Positional[Part | Literal["all"]]
    """loader: reading and augmenting batches on the CPU, against torchvision's DataLoader and FFCV's own augmentation.
    step: augmentation, forward, backward and optimizer on the device, against torchvision's googlenet and the limits of
    the device. train: whole training against its step alone. scaling: 1 to N processes. all: each of these in turn, in
    a process of its own."""
    data: DataFolder = field(default_factory=DataFolder)
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    repeats: int = 5
    """Measurements of each row, interleaved (A B A B)."""
    seconds: float = 0.5
    """Minimum length of one measurement."""
    batch_size: int = 250
    """loader: images per batch."""
    micro_batch_size: tuple[int, ...] = ()
    """Images per forward pass. Default: 128 on CPUs; 512, for some networks also 128, on GPUs."""
    stem: tuple[Stem, ...] = ()
    """First layers of the networks. Default: strided on CPUs, pooled and cifar on GPUs."""
    width: float = 1.0
    """Factor on the channels of this project's networks. At another width than 1 torchvision's are left out."""
    precision: PrecisionName | Literal["auto"] = "auto"
    """As train.precision."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Also measure with torch.compile. auto: on GPUs only, because compiling for a CPU takes minutes."""
    limit_minutes: float = 8.0
    """all: parts that have not finished after this time are left out, and reported as such."""
    json: Path | None = None
    """Also write the figures to this file, for `bench compare`."""

    def stems(self, on_gpu: bool) -> tuple[Stem, ...]:
        return self.stem or (("pooled", "cifar") if on_gpu else ("strided",))

    def micro_batch_sizes(self, on_gpu: bool) -> tuple[int, ...]:
        return self.micro_batch_size or ((512,) if on_gpu else (128,))

    def compiles(self, on_gpu: bool) -> bool:
        return self.compile == "on" or (self.compile == "auto" and on_gpu)


@dataclass(frozen=True)
class CompareConfig:
    old: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OLD")]]
    """File written with --json."""
    new: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="NEW")]]
    """A later one."""


def as_arguments(config: BenchConfig) -> list[str]:
    """The command line that `cli.parse` parses to `config`."""
    words = [config.part, "--data.dir", str(config.data.dir)]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name not in ("part", "data") and value not in (None, ()):
            words += [f"--{item.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def validate(config: BenchConfig) -> None:
    """Refuse values that cannot be measured.

    Raises:
        UserError: names the setting, its value and what is valid.
    """
    for name, valid in _RANGES.items():
        value = getattr(config, name)
        if not all(number in valid for number in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name} is {value}; valid: {valid}.")
    if config.json is not None and not config.json.parent.is_dir():  # before minutes of measuring
        raise UserError(f"json {config.json}: the folder {config.json.parent} does not exist.")
