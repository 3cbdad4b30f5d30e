"""The child process of `beton_writer.write_betons`: FFCV's DatasetWriter, without what makes it hang.

FFCV's own loop forks workers and waits for a counter; when one of them dies of a full disk or a bad sample,
it waits for ever. Here its worker function runs in this one process, so an error is an exception; 50,000
images take 2 s either way, and with a single worker the bytes do not depend on timing.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.data.beton_format import PAGE_BYTES, SAMPLE_BYTES


class _Anonymous:
    """Stands in for a SharedMemory segment, whose name would outlive a process that is killed."""

    def __init__(self, create: bool, size: int) -> None:
        assert create
        self.buf = mmap.mmap(-1, size)


class _Samples:
    """Indexable (image, label, index), in the order of the fields."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        return self.images[index], int(self.labels[index]), index


def _write(path: str, samples: _Samples, num_samples: int) -> None:
    """What DatasetWriter.from_indexed_dataset does, with its one worker called in place of forked."""
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    ffcv.writer.shared_memory = SimpleNamespace(SharedMemory=_Anonymous)
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), "index": IntField()}
    writer = ffcv.writer.DatasetWriter(path, fields, page_size=PAGE_BYTES, num_workers=1)
    writer.num_samples = num_samples
    writer.prepare()
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    todo.put([(index, index) for index in range(num_samples)])
    todo.put(None)
    allocations: queue.SimpleQueue[Any] = queue.SimpleQueue()
    allocator = ffcv.writer.MemoryAllocator(path, writer.data_region_start, PAGE_BYTES)
    done = ffcv.writer.Value("Q", 0)
    ffcv.writer.worker_job_indexed_dataset(
        todo, writer.metadata_sm, writer.metadata_type, fields, allocator, done, allocations, samples
    )
    writer.finalize(allocations.get())


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and never writes; end of file means that it is gone."""
    os.read(0, 1)
    os._exit(1)


def main(fd: int, jobs: list[tuple[str, int]]) -> None:
    """Write each (path, N) from `fd`: per job the images uint8 (N, 32, 32, 3), then the labels int64 (N,)."""
    threading.Thread(target=_end_with_parent, daemon=True).start()  # before the long import of ffcv
    with os.fdopen(fd, "rb") as file:
        content = np.memmap(file, np.uint8, mode="r")
    offset = 0
    for path, num_samples in jobs:
        end = offset + num_samples * SAMPLE_BYTES
        images = content[offset:end].reshape(num_samples, 32, 32, 3)
        offset = end + num_samples * 8
        _write(path, _Samples(images, content[end:offset].view(np.int64)), num_samples)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
