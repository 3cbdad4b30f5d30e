"""FFCV as the reader of raw bytes: .beton to uint8 images on the device, in an order given from outside.

Order, augmentation and sharding are not FFCV's here. What this module adds to `ffcv.loader.Loader` is that an
error in its thread reaches the consumer, that an epoch can be left early, that a batch stays what it was, and
that torch keeps its thread count.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar_dist.data.ffcv_parts import (
    EpochIterator,
    IntDecoder,
    Loader,
    OSCacheManager,
    Reader,
    SimpleRGBImageDecoder,
    ToDevice,
    ToTensor,
    ToTorchImage,
)
from cifar_dist.errors import DataError, UserError

_POLL_S = 1.0


class Batch(NamedTuple):
    """images (N, 3, 32, 32) uint8 in channels-last order, labels (N,) int64, indices (N,) int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class _Reading(EpochIterator):  # type: ignore[misc]
    """FFCV's reading thread, with its failures caught. FFCV's own leaves the consumer waiting for ever."""

    def __init__(self, loader: Loader, order: npt.NDArray[np.int64]) -> None:
        self.failure: BaseException | None = None
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self.failure = error

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # else, with nobody waiting, FFCV would read on to the end of the epoch
        if cuda_event is not None:
            # FFCV lets only its stream wait until this slot is free, while its decoder writes host memory at once.
            cuda_event.synchronize()
        return super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)

    def wait(self) -> Any:
        """The next batch as FFCV made it, or None at the end.

        Raises:
            DataError: the reading thread failed; the cause is chained.
        """
        while True:
            try:
                item = self.output_queue.get(timeout=_POLL_S if self.is_alive() else 0)
            except queue.Empty:
                if self.is_alive() or not self.output_queue.empty():
                    continue
                path = Path(self.loader.fname)
                raise DataError(
                    f"FFCV's reading thread failed on {path}: {self.failure!r}. Check that the file is still there "
                    f"and unchanged: python -m cifar_dist.prepare --data.dir {path.parent}"
                ) from self.failure
            if item is not None and torch.cuda.is_available():
                self.current_stream.wait_stream(self.cuda_streams[item[0]])
            return item


def end_reading(reading: EpochIterator) -> None:
    """End FFCV's thread, wherever it is: it may be waiting for room in the queue."""
    reading.terminate_event.set()
    while reading.is_alive():
        while not reading.output_queue.empty():
            reading.output_queue.get()
        reading.join(timeout=0.02)
    for stream in reading.cuda_streams:
        if stream is not None:
            stream.synchronize()  # copies into the buffers that are about to go
    reading.close()


class BetonLoader:
    """Reads batches of a verified .beton file on to `device`; a context manager that ends its threads.

    Args:
        path: a file that `data.dataset` has verified (FFCV maps it unchecked).
        num_workers: reading threads, at most the processors that this process may use.

    Raises:
        UserError: more workers than processors.
    """

    def __init__(self, path: Path, device: torch.device, num_workers: int = 1) -> None:
        available = len(os.sched_getaffinity(0))
        if num_workers > available:
            raise UserError(f"data.num_workers is {num_workers}; this process may use {available} processors.")
        threads = torch.get_num_threads()
        move = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
        self._loader = Loader(
            str(path),
            batch_size=1,  # each reading sets its own
            num_workers=num_workers,
            drop_last=False,
            pipelines={
                "image": [SimpleRGBImageDecoder(), ToTensor(), *move, ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), *move],
                "index": [IntDecoder(), ToTensor(), *move],
            },
        )
        torch.set_num_threads(threads)
        self._readings: list[_Reading] = []

    def of(self, path: Path) -> BetonLoader:
        """A loader of another verified file, which shares this one's compiled code."""
        other = copy.copy(self)
        other._loader, other._readings = copy.copy(self._loader), []
        other._loader.fname, other._loader.reader = str(path), Reader(str(path))
        other._loader.memory_manager = OSCacheManager(other._loader.reader)
        return other

    def read(self, order: npt.NDArray[np.int64], batch_size: int) -> Generator[Batch]:
        """Yield the samples of `order`, in order, in batches that stay valid for ever; the last may be smaller.

        Leaving it early ends its thread when the iterator is closed or collected, at the latest with the loader.

        Raises:
            ValueError: an index outside the file, which FFCV would follow into other memory.
            DataError: reading failed.
        """
        num_samples = int(self._loader.reader.num_samples)
        if len(order) and not (order.min() >= 0 and order.max() < num_samples):
            raise ValueError(f"indices from {order.min()} to {order.max()} in a file of {num_samples} samples")
        self._loader.batch_size = batch_size
        threads = torch.get_num_threads()
        reading = _Reading(self._loader, order.astype(np.uint64))
        self._readings.append(reading)
        first = True
        try:
            while (item := reading.wait()) is not None:
                if first:
                    # By its first batch FFCV's thread has set torch's thread count for the last time.
                    torch.set_num_threads(threads)
                    first = False
                images, labels, indices = item[1]
                # FFCV writes the next batches into the same few buffers.
                yield Batch(images.clone(), labels[:, 0].clone(), indices[:, 0].clone())
        finally:
            end_reading(reading)
            self._readings.remove(reading)

    def close(self) -> None:
        for reading in self._readings:
            end_reading(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def num_reading_threads() -> int:
    """How many of FFCV's threads are alive in this process."""
    return sum(isinstance(thread, EpochIterator) for thread in threading.enumerate())
