"""What people would use instead, built from installed libraries only."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import datasets, models
from torchvision.models.googlenet import BasicConv2d
from torchvision.transforms import v2

from cifar_dist.config import NUM_CLASSES
from cifar_dist.data.augment import MEAN, STD
from cifar_dist.data.beton import Images, Labels
from cifar_dist.data.ffcv_parts import IntDecoder, Loader, SimpleRGBImageDecoder, ToTensor, ToTorchImage
from cifar_dist.data.loader import end_reading


class InMemoryCifar10(datasets.CIFAR10):  # type: ignore[misc]
    """torchvision's CIFAR10 with its own __getitem__, over arrays that are already here in place of its files."""

    def __init__(self, images: Images, labels: Labels, transform: Any) -> None:
        datasets.VisionDataset.__init__(self, root="", transform=transform)
        self.data, self.targets = images, labels.tolist()


def torchvision_batches(
    images: Images, labels: Labels, batch_size: int, num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end from torchvision's CIFAR10, its v2 transforms per image (crop with padding, flip, float32,
    normalised) and torch's DataLoader: images (N, 3, 32, 32) float32, labels (N,) int64."""
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
        ]
    )
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        InMemoryCifar10(images, labels, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    while True:
        yield from loader


def ffcv_batches(path: Path, batch_size: int) -> Generator[tuple[Tensor, Tensor]]:
    """Batches without end from FFCV with its own augmentation on the CPU, as in its CIFAR-10 example: flip,
    translation by 2, cutout of 4; then float32 (there float16, which CPUs do slowly) and normalised."""
    from ffcv.loader import OrderOption
    from ffcv.transforms import Convert, Cutout, RandomHorizontalFlip, RandomTranslate
    from torchvision.transforms import Normalize

    fill = tuple(int(value) for value in MEAN)
    augmentation = [RandomHorizontalFlip(), RandomTranslate(padding=2, fill=fill), Cutout(4, fill)]
    numbers = [ToTensor(), ToTorchImage(), Convert(torch.float32), Normalize(MEAN, STD)]
    threads = torch.get_num_threads()
    loader = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=1,
        drop_last=True,
        pipelines={
            "image": [SimpleRGBImageDecoder(), *augmentation, *numbers],
            "label": [IntDecoder(), ToTensor()],
            "index": [IntDecoder(), ToTensor()],
        },
        order=OrderOption.RANDOM,
    )
    while True:
        epoch = iter(loader)
        try:
            for images, labels, _ in epoch:
                torch.set_num_threads(threads)
                yield images, labels[:, 0]
        finally:  # left early, FFCV's thread would wait for room in its queue for ever
            end_reading(epoch)


def googlenet(stem: str) -> nn.Module:
    """torchvision's googlenet (3x3 in place of 5x5, its own initialisation left out) with the stem of this project.

    Raises:
        ValueError: a stem that its attributes cannot be made into.
    """
    network: Any = models.googlenet(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    if stem == "pooled":
        network.conv1 = BasicConv2d(3, 64, kernel_size=3, padding=1)
    elif stem in ("cifar", "strided"):
        network.conv1 = BasicConv2d(3, 192, kernel_size=3, stride=2 if stem == "strided" else 1, padding=1)
        network.maxpool1 = network.conv2 = network.conv3 = nn.Identity()
    else:
        raise ValueError(f"torchvision's googlenet cannot be given the stem {stem}")
    network.maxpool2 = nn.Identity()
    built: nn.Module = network
    return built
