"""Counters for what a training step does: its operations, their memory layout, and what waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.phase import current

_COPIES = ("clone", "_to_copy", "copy_")
# What a network is made of, forwards and backwards; the second take a share of the channels as it is, the first would
# have it copied inside.
_WHOLE, _PIXEL_BY_PIXEL = ("convolution", "batch_norm", "pool2d"), ("cat", "relu", "threshold")
# These read a CPU's memory without an operation that a dispatch mode would see.
_READ_ON_CPU = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside, backward passes and optimizers included; views compute nothing and do not count.

    Args:
        batch_size: of a micro-batch; no layer may have as many channels, as its filters would look like activations.

    `by_place` counts by where in a step they ran. Of the activations (N, C, H, W): `copies` by operation;
    `not_channels_last` and `widened` (from 16 bits to 32) name the operations.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch_size = batch_size
        self.by_place: Counter[str] = Counter()
        self.by_name: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.not_channels_last: list[str] = []
        self.widened: list[str] = []
        self._counts = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether compiled code still runs inside."""
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing counts inside."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or not self._counts or name.startswith("_record_function"):
            return result
        self.by_place[current.phase.name] += 1
        self.by_name[name] += 1
        taken, given = list(self._activations((args, kwargs))), list(self._activations(result))
        if taken or given:
            self._look(name, taken, given)
        return result

    def _activations(self, values: Any) -> Iterator[Tensor]:
        for value in tree_leaves(values):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if floating and value.ndim == 4 and len(value) == self.batch_size:
                yield value

    def _look(self, name: str, taken: list[Tensor], given: list[Tensor]) -> None:
        if name in _COPIES:
            self.copies[name] += 1
        layouts = [tuple(x.shape) + x.stride() for x in taken + given]
        shares = any(word in name for word in _PIXEL_BY_PIXEL)
        if shares or any(word in name for word in _WHOLE):
            good = all(map(_is_share if shares else _is_channels_last, taken)) and all(map(_is_channels_last, given))
            if not good:
                self.not_channels_last.append(f"{name} {layouts}")
        if any(x.dtype == torch.float32 for x in given) and any(x.itemsize < 4 for x in taken):
            self.widened.append(f"{name} {layouts}")


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_share(x: Tensor) -> bool:
    """Whether `x` (N, C, H, W) is some channels of a channels-last tensor."""
    return _is_channels_last(x) or x.stride(1) == 1


class Wait(NamedTuple):
    operation: str
    place: str


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what would make the host wait, if the tensors were on a device, and where in the run that was.

    It is what reads the numbers in a tensor, or whose output's size depends on them: item(), bool(), nonzero(), an
    index by a mask. `host` are tensors that are on the CPU whatever the device is.
    """

    def __init__(self, *host: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host = {id(tensor) for tensor in host}
        self.seen: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if _reads_numbers(func, args) and not all(id(tensor) in self.host for tensor in tensors):
            self.seen.append(Wait(func.overloadpacket.__name__, current.phase.name))
        return func(*args, **(kwargs or {}))


def _reads_numbers(func: Any, args: Any) -> bool:
    if func.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class CpuReads(TorchFunctionMode):
    """Adds to `waits` what reads a CPU's memory without an operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ_ON_CPU:
            self.waits.seen.append(Wait(func.__name__, current.phase.name))
        return func(*args, **(kwargs or {}))
