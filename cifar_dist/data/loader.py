"""Reads a .beton with FFCV: uint8 batches on the device, in a given order.

Only FFCV's reading is used; order, sharding and augmentation are in `order` and `augment`. Unlike with FFCV's own
loader, an error in the reading thread reaches the consumer, an epoch can be left early, a batch keeps its content, and
torch keeps its thread count.
"""

import copy
import itertools
import os
import queue
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numba
import numba.typed
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar_dist import machine_code
from cifar_dist.errors import DataError, UserError, one_line

_POLL_S = 1.0
_END_S = 1.0


@contextmanager
def _explain_numba(num_workers: int) -> Iterator[None]:
    """Name numba's own environment variables in its errors about threads."""
    try:
        yield
    except ValueError as error:
        given = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
        if not given:
            raise
        raise UserError(
            f"data.num_workers is {num_workers}, but numba cannot start these threads: {one_line(error)}\n"
            f"It was told so by environment variables: {given}. Change or unset them."
        ) from None


# All patches of numba and FFCV:
# - Importing FFCV compiles a typed dictionary for a table of two constants (3 s). Only Python code reads that table, so
#   a plain dictionary does.
# - Importing FFCV sets torch to one thread.
# - Each Loader compiles the function that finds a sample's bytes (0.25 s): see `_compiled_reader`.
_threads, _typed_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    with _explain_numba(1):
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers import OSCacheManager
        from ffcv.reader import Reader
        from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
finally:
    numba.typed.Dict = _typed_dict
    torch.set_num_threads(_threads)


def _find_bytes(address: Any, file: Any) -> Any:
    """The bytes of the sample at `address`. `file`: all bytes, addresses of the samples (ascending), their sizes."""
    size = file[2][np.searchsorted(file[1], address)]
    return file[0][address : address + size]


@cache
def _compiled_reader() -> Any:
    signature = numba.uint8[::1](numba.uint64, OSCacheManager.state_type.fget(None))
    return machine_code.compiled(_find_bytes, signature, fastmath=True)  # as ffcv.pipeline.compiler


OSCacheManager.compile_reader = lambda _: _compiled_reader()


class Batch(NamedTuple):
    """images (N, 3, 32, 32) uint8, channels-last; labels (N,) int64; indices (N,) int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class ReadingThread(EpochIterator):  # type: ignore[misc]
    """FFCV's reading thread, which also passes its error on. With FFCV's own, the consumer would wait forever."""

    def __init__(self, loader: Loader, order: npt.NDArray[np.int64]) -> None:
        self.failure: BaseException | None = None
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(self.current_stream.device)  # else `synchronize` below opens GPU 0, too
            super().run()
        except BaseException as error:  # noqa: BLE001 - `next_batch` raises it
            self.failure = error

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # FFCV would read to the end of the epoch
        if cuda_event is not None:
            # FFCV makes only its stream wait until this slot is free, but its decoder writes host memory at once.
            cuda_event.synchronize()
        elif torch.cuda.is_available():
            # The slot's memory on the device may come from tensors that the main stream still uses.
            self.cuda_streams[batch_slot].wait_stream(self.current_stream)
        return super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)

    def next_batch(self) -> Any:
        """FFCV's next batch, (slot, tensors), or None at the end.

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
    """End FFCV's thread, and wait for it for at most `_END_S`.

    It does not end while it waits for a GPU that computes without end, as for a rank that is gone.
    """
    reading.terminate_event.set()
    deadline = time.monotonic() + _END_S
    while reading.is_alive():
        if time.monotonic() > deadline:
            return
        while not reading.output_queue.empty():  # it may be waiting for room in the queue
            reading.output_queue.get()
        reading.join(timeout=0.02)
    for stream in reading.cuda_streams:
        while stream is not None and not stream.query():  # copies into the buffers that are about to go
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
    reading.close()


class BetonLoader:
    """Reads batches of a .beton to `device`; a context manager that ends its threads.

    Args:
        path: a file that `prepare.install` has verified, since FFCV follows its pointers unchecked.
        num_workers: decoding threads, at most the processors that this process may use.

    Raises:
        UserError: more workers than processors, or than numba's own environment variables allow.
    """

    def __init__(self, path: Path, device: torch.device, num_workers: int = 1) -> None:
        available = len(os.sched_getaffinity(0))
        if num_workers > available:
            raise UserError(f"data.num_workers is {num_workers}; this process may use {available} processors.")
        with _explain_numba(num_workers):
            numba.set_num_threads(num_workers)
        threads = torch.get_num_threads()
        move = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
        self._loader = Loader(
            str(path),
            batch_size=1,  # `read` sets its own
            num_workers=num_workers,
            drop_last=False,
            pipelines={
                "image": [SimpleRGBImageDecoder(), ToTensor(), *move, ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), *move],
                "index": [IntDecoder(), ToTensor(), *move],
            },
        )
        torch.set_num_threads(threads)
        self._readings: list[ReadingThread] = []

    def for_file(self, path: Path) -> Self:
        """A loader of another verified file, with this one's compiled code."""
        other = copy.copy(self)
        other._loader, other._readings = copy.copy(self._loader), []
        other._loader.fname, other._loader.reader = str(path), Reader(str(path))
        other._loader.memory_manager = OSCacheManager(other._loader.reader)
        return other

    def read(self, order: npt.NDArray[np.int64], batch_size: int) -> Generator[Batch]:
        """Yield the samples `order` (N,), in that order; the last batch may be smaller.

        The thread ends when the iterator is exhausted, closed or collected, at the latest when the loader is closed.

        Raises:
            ValueError: an index outside the file; FFCV would read other memory.
            DataError: reading failed.
        """
        num_samples = int(self._loader.reader.num_samples)
        if len(order) and not (order.min() >= 0 and order.max() < num_samples):
            raise ValueError(f"indices from {order.min()} to {order.max()} in a file of {num_samples} samples")
        self._loader.batch_size = batch_size
        threads = torch.get_num_threads()
        reading = ReadingThread(self._loader, order.astype(np.uint64))
        self._readings.append(reading)
        try:
            for number in itertools.count():
                if (item := reading.next_batch()) is None:
                    return
                if number == 0:
                    torch.set_num_threads(threads)  # FFCV's thread sets it to 1, before its first batch only
                images, labels, indices = item[1]
                # FFCV reuses its few buffers for the next batches.
                yield Batch(images.clone(), labels[:, 0].clone(), indices[:, 0].clone())
        finally:
            end_reading(reading)
            self._readings.remove(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reading in self._readings:
            end_reading(reading)


def read_labels(path: Path) -> npt.NDArray[np.int64]:
    """Labels (N,) of a verified .beton, in the order of their index; the images are not read."""
    return np.ascontiguousarray(Reader(str(path)).metadata["f1"])  # the second field; "f0" is the image
