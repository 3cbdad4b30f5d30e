"""Arguments of `python -m cifar_dist.bench`. Does not import torch, so that `--help` is fast."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import tyro

from cifar_dist.config import Device, Positive, PrecisionName, Range

Part = Literal["loader", "step", "train", "scaling"]
PARTS: tuple[Part, ...] = get_args(Part)
Stem = Literal["cifar", "pooled", "strided", "whiten"]


@dataclass(frozen=True)
class BenchConfig:
    part: tyro.conf.Positional[Part | Literal["all"]]
    """loader: reading and augmenting batches on the CPU, against torchvision's DataLoader and FFCV's own augmentation.
    step: augmentation, forward, backward and optimizer on the device, against torchvision's googlenet and the limits of
    the device. train: whole training against its step alone. scaling: 1 to N processes. all: each of these in turn, in
    a process of its own."""
    data_dir: Annotated[Path, tyro.conf.arg(name="data.dir")] = Path("data")
    """Holds the prepared dataset."""
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    repeats: Positive = 5
    """Measurements of each row, interleaved (A B A B)."""
    seconds: Annotated[float, Range(above=0, max=600)] = 0.5
    """Minimum length of one measurement."""
    batch_size: Annotated[int, Range(min=1, max=10_000)] = 250
    """loader: images per batch."""
    micro_batch_size: Annotated[tuple[int, ...], Range(min=2, max=16_384)] = ()
    """Images per forward pass; of several, train and scaling take the first. Default: 128 on CPUs, 512 on GPUs."""
    stem: tuple[Stem, ...] = ()
    """First layers of the networks; of several, train and scaling take the first. Default: strided on CPUs, pooled and
    cifar on GPUs."""
    width: Annotated[float, Range(above=0, max=16)] = 1.0
    """Factor on the channels of this project's networks. At another width than 1 torchvision's are left out."""
    precision: PrecisionName | Literal["auto"] = "auto"
    """As train.precision."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Also measure with torch.compile. auto: on GPUs only, because compiling for a CPU takes minutes."""
    limit_minutes: Annotated[float, Range(above=0)] = 8.0
    """all: parts that have not finished after this time are left out, and reported as such."""
    json: Path | None = None
    """Also write the figures to this file, for `bench compare`."""

    def resolve(self, on_gpu: bool) -> Self:
        """These settings with the defaults of the device; only then `device`, `compile` and the tuples may be used."""
        return replace(
            self,
            device="cuda" if on_gpu else "cpu",
            micro_batch_size=self.micro_batch_size or ((512,) if on_gpu else (128,)),
            stem=self.stem or (("pooled", "cifar") if on_gpu else ("strided",)),
            compile="on" if self.compile == "on" or (self.compile == "auto" and on_gpu) else "off",
        )


@dataclass(frozen=True)
class CompareConfig:
    old: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OLD")]]
    """File written with --json."""
    new: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="NEW")]]
    """A later one."""
