"""Training steps and loaders to compare: of this project, of torchvision, of FFCV."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.models.googlenet import BasicConv2d
from torchvision.transforms import Normalize, v2

from cifar_dist.config import NUM_CLASSES, ModelConfig, OptimConfig
from cifar_dist.data.augment import MEAN, STD
from cifar_dist.data.loader import Batch
from cifar_dist.data.prepare import beton
from cifar_dist.models.architectures import create_model
from cifar_dist.training import optim
from cifar_dist.training.precision import Precision, compile_for_training

TORCHVISION_NCHW, TORCHVISION_NHWC = "torchvision googlenet, NCHW", "torchvision googlenet, channels-last"


class BareStep:
    """Forward, backward and SGD on one batch in memory. `network` is `model`, possibly compiled or in DDP."""

    def __init__(self, model: nn.Module, num_images: int, precision: Precision, order: torch.memory_format) -> None:
        device = torch.device(precision.device_type)
        self.model = model.to(device, precision.parameters).to(memory_format=order).train()
        self.network, self.precision = self.model, precision
        images = torch.randn(num_images, 3, 32, 32, device=device)
        self.images = images.to(precision.inputs).to(memory_format=order)
        self.labels = torch.arange(num_images, device=device) % NUM_CLASSES
        sgd: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **sgd)

    def __call__(self, accumulation: int = 1, exchange: bool = True) -> None:
        """Do one step on the batch, `accumulation` times in a row; DDP exchanges gradients the last time, if at all."""
        for k in range(accumulation):
            silent = isinstance(self.network, DistributedDataParallel) and not (exchange and k == accumulation - 1)
            with self.network.no_sync() if silent else nullcontext():  # type: ignore[operator]
                torch.autograd.backward(self.loss() if accumulation == 1 else self.loss() / accumulation)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        with self.precision.autocast():
            logits = self.network(self.images)
        return F.cross_entropy(logits.float(), self.labels)


def project_step(
    config: ModelConfig,
    num: int,
    precision: Precision,
    compiled: bool = False,
    muon: bool = False,
    cuda_graphs: bool = False,
    static_launcher: bool = False,
) -> BareStep:
    """A network of this project, channels-last, with SGD, or with Muon for its filters."""
    step = BareStep(create_model(config), num, precision, torch.channels_last)
    step.optimizer = optim.build_optimizer(step.model, OptimConfig(name="muon" if muon else "sgd"), num, precision.muon)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    if compiled:
        step.network = compile_for_training(step.model, cuda_graphs, static_launcher)
    return step


def torchvision_step(stem: str, num: int, precision: Precision, channels_last: bool = False) -> BareStep:
    """torchvision's googlenet with torch's SGD, in NCHW order, which is the default, or channels-last."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    return BareStep(torchvision_googlenet(stem), num, precision, order)


def torchvision_googlenet(stem: str) -> nn.Module:
    """torchvision's googlenet (3x3 in place of 5x5) with the stem pooled, cifar or strided, default initialisation."""
    network: nn.Module = models.googlenet(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    if stem == "pooled":
        network.conv1 = BasicConv2d(3, 64, kernel_size=3, padding=1)
    else:
        network.conv1 = BasicConv2d(3, 192, kernel_size=3, stride=2 if stem == "strided" else 1, padding=1)
        network.maxpool1 = network.conv2 = network.conv3 = nn.Identity()
    network.maxpool2 = nn.Identity()
    return network


def has_torchvision_counterpart(stem: str, width: float) -> bool:
    """Whether torchvision's googlenet can be compared: it has no width and no whitening stem."""
    return width == 1 and stem != "whiten"


def blank_batches(num_images: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Endless pairs (epoch, micro-batch) of black images, in the format of the loader."""
    images = torch.zeros(num_images, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    indices = torch.arange(num_images, device=device)
    return itertools.repeat((0, Batch(images, torch.zeros_like(indices), indices)))


def torchvision_batches(
    path: Path, batch_size: int, num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches from torchvision's CIFAR10 with the images of a .beton, by torch's DataLoader.

    torchvision's v2 transforms of each image are crop with padding, flip, float32, normalisation. A batch is images
    (N, 3, 32, 32) float32 and labels (N,) int64.
    """
    images, labels = beton.read_arrays(path)
    dataset: Any = datasets.CIFAR10.__new__(datasets.CIFAR10)  # without reading its files
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    conversion = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    datasets.VisionDataset.__init__(dataset, root="", transform=v2.Compose([*augmentation, *conversion]))
    dataset.data, dataset.targets = images, labels.tolist()
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, pin_memory=pin_memory, **workers)
    return itertools.chain.from_iterable(itertools.repeat(loader))


@contextmanager
def without_prefetched(batches: Iterator[object], num_workers: int) -> Iterator[None]:
    """Around a measurement: take the batches that DataLoader's workers prefetched; at the end let them refill."""
    for _ in range(2 * num_workers):  # its default prefetch_factor is 2
        next(batches)
    yield
    if num_workers:
        time.sleep(0.3)  # until the queues are full and the workers idle, so that they do not disturb other cases


def ffcv_batches(path: Path, batch_size: int, num_workers: int) -> Iterator[list[Tensor]]:
    """Endless batches from FFCV with its own augmentation on the CPU, as in its CIFAR-10 example.

    Flip, translation by 2, cutout of 4, normalisation. Images are float32; the example's float16 is slow on CPUs.
    FFCV's thread, a daemon, stays when the iterator is left: it waits for room in its queue.
    """
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Convert, Cutout, RandomHorizontalFlip, RandomTranslate, ToTensor, ToTorchImage

    fill = tuple(int(value) for value in MEAN)
    augmentation = [RandomHorizontalFlip(), RandomTranslate(padding=2, fill=fill), Cutout(4, fill)]
    conversion = [ToTensor(), ToTorchImage(), Convert(torch.float32), Normalize(MEAN, STD)]
    threads = torch.get_num_threads()
    pipelines = {"image": [SimpleRGBImageDecoder(), *augmentation, *conversion]}
    pipelines |= {name: [IntDecoder(), ToTensor()] for name in ("label", "index")}
    loader = Loader(str(path), batch_size, num_workers, order=OrderOption.RANDOM, pipelines=pipelines, drop_last=True)
    while True:
        for batch in loader:
            torch.set_num_threads(threads)  # FFCV sets it to 1
            yield batch
