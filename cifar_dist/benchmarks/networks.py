"""The networks under measurement and a training step of theirs, as plain as it can be written."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.benchmarks import baselines
from cifar_dist.config import NUM_CLASSES, ModelConfig, OptimConfig
from cifar_dist.models.registry import create_model
from cifar_dist.training import optim
from cifar_dist.training.precision import NumberFormat

THEIRS, THEIRS_LAST = "torchvision googlenet, NCHW", "torchvision googlenet, channels-last"


@dataclass
class Subject:
    """A network that trains on the same images in memory over and over: forward, backward, optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    formats: NumberFormat
    network: Callable[[Tensor], Tensor]

    def step(self) -> float:
        """One step; returns its number of images."""
        torch.autograd.backward(self.forward())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(len(self.labels))

    def forward(self) -> Tensor:
        with self.formats.autocast():
            logits = self.network(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def parts(self, wait: Callable[[], None]) -> tuple[float, float, float]:
        """Seconds of forward, backward and optimizer of one step."""
        times = [time.perf_counter()]
        loss = self.forward()
        for work in (loss.backward, self.optimizer.step):
            wait()
            times.append(time.perf_counter())
            work()
        wait()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        forward, backward, stepped = (b - a for a, b in itertools.pairwise(times))
        return forward, backward, stepped


def ours(
    config: ModelConfig, num_images: int, formats: NumberFormat, compile_mode: str | None = None, muon: bool = False
) -> Subject:
    """A network of this project, channels-last, with SGD or with Muon for its filters."""
    torch.manual_seed(0)
    model: nn.Module = create_model(config, formats.device_type)
    settings = replace(OptimConfig(), name="muon" if muon else "sgd")
    return _subject(model, num_images, formats, True, settings, compile_mode)


def theirs(stem: str, num_images: int, formats: NumberFormat, channels_last: bool) -> Subject:
    """torchvision's googlenet with torch's SGD, as its users run it, or in channels-last order."""
    torch.manual_seed(0)
    return _subject(baselines.googlenet(stem), num_images, formats, channels_last, None, None)


def _subject(
    model: nn.Module,
    num_images: int,
    formats: NumberFormat,
    channels_last: bool,
    settings: OptimConfig | None,
    compile_mode: str | None,
) -> Subject:
    device = torch.device(formats.device_type)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, formats.parameters).to(memory_format=memory_format).train()
    images = torch.randn(num_images, 3, 32, 32, device=device).to(formats.inputs)
    images = images.to(memory_format=memory_format)
    labels = torch.arange(num_images, device=device) % NUM_CLASSES
    if settings is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = optim.build_optimizer(model, settings, batch_size=num_images, muon_dtype=formats.muon)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    network: Callable[[Tensor], Tensor] = model
    if compile_mode is not None:
        network = torch.compile(model, dynamic=False, mode=compile_mode)
    return Subject(model, optimizer, images, labels, formats, network)
