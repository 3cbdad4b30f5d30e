"""How much memory training takes on one device, estimated on the CPU with a handful of images.

The real step runs twice, with two and with four images in a micro-batch, while every allocation of a tensor and its end
are written down. Both runs do the same in the same order, so each entry grows in proportion to the images, and the peak
follows for any number of them, equal to the byte to what the same count gives over a real micro-batch.

A process takes more, since LEFT_OUT adds to it. On two cores of a Xeon the resident memory of three steps was above the
estimate by 16 % (V1, width 0.25, whitening stem, 64 images, bf16: 132 MiB), 10 % (the same in fp32), 7 % (V1, width
0.5, 64 images, fp32: 1.4 GiB) and 34 % (V2, width 0.5, 64 images, bf16: 812 MiB). Not measured on a GPU yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.data.loader import Batch
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import reproducible
from cifar_dist.training.schedule import LOW_RESOLUTION, Step
from cifar_dist.training.stepper import Stepper

LEFT_OUT = "the CUDA context and libraries, workspaces, NCCL, the allocator's slack, and what torch.compile changes"
_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `activations` is what a training step takes beside the first four at its peak: activations,
    their gradients, temporaries. `evaluation` is the peak of scoring, with all that stays in memory meanwhile."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    evaluation: int

    @property
    def training(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema + self.activations

    @property
    def peak(self) -> int:
        return max(self.training, self.evaluation)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, keeps the books on the tensors that operations make: `line` has the bytes alive after each change.

    Args:
        alive: tensors that are there already, and count.
    """

    def __init__(self, alive: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.line = [0]
        self._seen: dict[int, Any] = {}
        for tensor in alive:
            self._enter(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._enter(value)
        return output

    def _enter(self, tensor: Tensor) -> None:
        # Views share a storage, whose address is its own for as long as it lives.
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._leave(key, size))
            self.line.append(self.line[-1] + size)

    def _leave(self, key: int, size: int) -> None:
        del self._seen[key]
        self.line.append(self.line[-1] - size)


def estimate(stepper: Stepper, micro_batch_size: int, eval_batch_size: int) -> Memory:
    """The memory of a training step and of scoring; `stepper` is on the CPU, not compiled, and is worn out by it."""
    parameters, optimizer, ema = (_num_bytes(part) for part in _state(stepper))
    trained = _num_bytes([p for p in stepper.model.parameters() if p.requires_grad])
    with reproducible(stepper.world.device):  # on one thread, since so little is slow on many of a busy machine
        training = _peak(stepper, lambda size: _step(stepper, size), micro_batch_size)
        evaluation = _peak(stepper, lambda size: _score(stepper, size), eval_batch_size)
    activations = max(0, training - parameters - trained - optimizer - ema)
    return Memory(parameters, trained, optimizer, ema, activations, evaluation)


def step_peak(stepper: Stepper, num_images: int) -> int:
    """The bytes alive at the peak of a real step with `num_images` in a micro-batch."""
    return max(_recorded(stepper, lambda: _step(stepper, num_images)))


def _peak(stepper: Stepper, work: Callable[[int], None], num_images: int) -> int:
    work(_FEW)  # what the first call alone allocates stays
    few, more = (_recorded(stepper, lambda size=size: work(size)) for size in (_FEW, _MORE))  # type: ignore[misc]
    growth = [(b - a) / (_MORE - _FEW) for a, b in zip(few, more, strict=True)]
    return round(max(a + slope * (num_images - _FEW) for a, slope in zip(few, growth, strict=True)))


def _recorded(stepper: Stepper, work: Callable[[], None]) -> list[int]:
    allocations = Allocations(tensor for part in _state(stepper) for tensor in part)
    with allocations:
        work()
    return allocations.line


def _state(stepper: Stepper) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What stays in memory between steps: parameters and buffers, the optimizer's, the moving average's."""
    model, ema = stepper.model, stepper.ema
    optimizer = [v for state in stepper.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    average = [] if ema is None else [*ema.parameters(), *ema.buffers()]
    return [*model.parameters(), *model.buffers()], optimizer, average


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _step(stepper: Stepper, num_images: int) -> None:
    share = stepper.config.augment.low_resolution_share
    step = Step(number=0, lr_share=0.0, side=LOW_RESOLUTION if share == 1 else None)
    stepper.step(step, blank_batches(num_images, stepper.world.device), Metrics(stepper.world))


@torch.no_grad()
def _score(stepper: Stepper, num_images: int) -> None:
    model = stepper.scored_model
    images = next(blank_batches(num_images, stepper.world.device))[1].images.to(stepper.number_format.inputs)
    was_training = model.training
    model.eval()
    with stepper.number_format.autocast():
        model(images)
    model.train(was_training)


def blank_batches(num_images: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """(epoch, micro-batch) for ever, as the loader gives them, all of black images."""
    labels = torch.zeros(num_images, dtype=torch.int64, device=device)
    while True:
        images = torch.zeros(num_images, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        yield 0, Batch(images, labels, torch.arange(num_images, device=device))
