"""Training steps and loaders to compare: of this project, of torchvision, of FFCV."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets, models
from torchvision.models.googlenet import BasicConv2d
from torchvision.transforms import Normalize, v2

from cifar_dist.config import NUM_CLASSES, ModelConfig, OptimConfig
from cifar_dist.data.augment import MEAN, STD
from cifar_dist.data.loader import Batch, end_reading
from cifar_dist.data.prepare.beton import Images, Labels
from cifar_dist.models.architectures import create_model
from cifar_dist.training import optim
from cifar_dist.training.precision import Precision

TORCHVISION_NCHW, TORCHVISION_NHWC = "torchvision googlenet, NCHW", "torchvision googlenet, channels-last"


@dataclass
class BareStep:
    """Forward, backward and optimizer on one batch in memory. `network` is `model`, possibly compiled or in DDP."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    precision: Precision
    network: Callable[[Tensor], Tensor]

    def __call__(self) -> float:
        """Do one step; returns its number of images."""
        torch.autograd.backward(self.loss())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(len(self.labels))

    def loss(self) -> Tensor:
        with self.precision.autocast():
            logits = self.network(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def seconds_by_part(self, wait: Callable[[], None]) -> tuple[float, float, float]:
        """Seconds of forward, backward and optimizer of one step."""
        times = [time.perf_counter()]
        loss = self.loss()
        for work in (loss.backward, self.optimizer.step):
            wait()
            times.append(time.perf_counter())
            work()
        wait()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        forward, backward, optimizer = (b - a for a, b in itertools.pairwise(times))
        return forward, backward, optimizer


def project_step(
    config: ModelConfig, num_images: int, precision: Precision, compile_mode: str | None = None, muon: bool = False
) -> BareStep:
    """A network of this project, channels-last, with SGD, or with Muon for its filters."""
    torch.manual_seed(0)
    step = _bare_step(create_model(config, precision.device_type), num_images, precision, torch.channels_last)
    settings = OptimConfig(name="muon" if muon else "sgd")
    step.optimizer = optim.build_optimizer(step.model, settings, num_images, precision.muon)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    if compile_mode is not None:
        step.network = torch.compile(step.model, dynamic=False, mode=compile_mode)
    return step


def torchvision_step(stem: str, num_images: int, precision: Precision, channels_last: bool = False) -> BareStep:
    """torchvision's googlenet with torch's SGD, in NCHW order, which is the default, or channels-last."""
    torch.manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return _bare_step(torchvision_googlenet(stem), num_images, precision, order)


def _bare_step(model: nn.Module, num_images: int, precision: Precision, order: torch.memory_format) -> BareStep:
    device = torch.device(precision.device_type)
    model = model.to(device, precision.parameters).to(memory_format=order).train()
    images = torch.randn(num_images, 3, 32, 32, device=device).to(precision.inputs).to(memory_format=order)
    labels = torch.arange(num_images, device=device) % NUM_CLASSES
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return BareStep(model, sgd, images, labels, precision, model)


def torchvision_googlenet(stem: str) -> nn.Module:
    """torchvision's googlenet (3x3 in place of 5x5) with a stem of this project, default initialisation.

    Raises:
        ValueError: a stem that cannot be made from its attributes.
    """
    network: Any = models.googlenet(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    if stem == "pooled":
        network.conv1 = BasicConv2d(3, 64, kernel_size=3, padding=1)
    elif stem in ("cifar", "strided"):
        network.conv1 = BasicConv2d(3, 192, kernel_size=3, stride=2 if stem == "strided" else 1, padding=1)
        network.maxpool1 = network.conv2 = network.conv3 = nn.Identity()
    else:
        raise ValueError(f"torchvision's googlenet cannot have the stem {stem}")
    network.maxpool2 = nn.Identity()
    built: nn.Module = network
    return built


def has_torchvision_counterpart(stem: str, width: float) -> bool:
    """Whether torchvision's googlenet can be compared: it has no width and no whitening stem."""
    return width == 1 and stem != "whiten"


def blank_batches(num_images: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Endless pairs (epoch, micro-batch) of black images, in the format of the loader."""
    labels = torch.zeros(num_images, dtype=torch.int64, device=device)
    while True:
        images = torch.zeros(num_images, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        yield 0, Batch(images, labels, torch.arange(num_images, device=device))


class _InMemoryCifar10(datasets.CIFAR10):  # type: ignore[misc]
    """torchvision's CIFAR10 with its own __getitem__, over given arrays instead of its files."""

    def __init__(self, images: Images, labels: Labels, transform: Any) -> None:
        datasets.VisionDataset.__init__(self, root="", transform=transform)
        self.data, self.targets = images, labels.tolist()


class TorchvisionLoader:
    """Endless batches from torchvision's CIFAR10, its v2 transforms per image and torch's DataLoader.

    The transforms are crop with padding, flip, float32, normalisation. `next` gives images (N, 3, 32, 32) float32 and
    labels (N,) int64.
    """

    def __init__(
        self, arrays: tuple[Images, Labels], batch_size: int, num_workers: int, pin_memory: bool = False
    ) -> None:
        transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
            ]
        )
        self._num_workers = num_workers
        self._loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            _InMemoryCifar10(*arrays, transform),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
        self._batches = itertools.chain.from_iterable(self._loader for _ in itertools.count())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        images, labels = next(self._batches)
        return images, labels

    def drain(self) -> None:
        """Take the batches that worker processes prefetched while something else was measured."""
        for _ in range(2 * self._num_workers):  # DataLoader's default prefetch_factor is 2
            next(self)


def ffcv_batches(path: Path, batch_size: int) -> Generator[tuple[Tensor, Tensor]]:
    """Endless batches from FFCV with its own augmentation on the CPU, as in its CIFAR-10 example.

    Flip, translation by 2, cutout of 4, normalisation. Images are float32; the example's float16 is slow on CPUs.
    """
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Convert, Cutout, RandomHorizontalFlip, RandomTranslate, ToTensor, ToTorchImage

    fill = tuple(int(value) for value in MEAN)
    augmentation = [RandomHorizontalFlip(), RandomTranslate(padding=2, fill=fill), Cutout(4, fill)]
    conversion = [ToTensor(), ToTorchImage(), Convert(torch.float32), Normalize(MEAN, STD)]
    threads = torch.get_num_threads()
    loader = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=1,
        drop_last=True,
        pipelines={
            "image": [SimpleRGBImageDecoder(), *augmentation, *conversion],
            "label": [IntDecoder(), ToTensor()],
            "index": [IntDecoder(), ToTensor()],
        },
        order=OrderOption.RANDOM,
    )
    while True:
        epoch = iter(loader)
        try:
            for images, labels, _ in epoch:
                torch.set_num_threads(threads)  # FFCV sets it to 1
                yield images, labels[:, 0]
        finally:
            end_reading(epoch)  # otherwise FFCV's thread waits for room in its queue for ever
