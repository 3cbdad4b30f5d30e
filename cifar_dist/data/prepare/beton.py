"""Writes .beton files with FFCV in a child process, and reads them without FFCV.

FFCV's own loop forks workers and waits forever if one dies of a full disk. Here its worker function runs alone in a
child process: an error ends the child, the bytes do not depend on timing, and FFCV's import and output stay out of this
process. It takes as long as FFCV's own loop.

The files are little-endian: header (24 bytes), a descriptor of 1041 bytes per field, metadata (32 bytes per sample),
zeros up to a multiple of the page size, pages of as many whole images as fit, and an allocation table (24 bytes per
sample).
"""

import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.errors import DataError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Arrays = tuple[Images, npt.NDArray[np.integer[Any]]]

PAGE_BYTES = 1 << 21  # FFCV's smallest page; its default of 8 MiB would add 10 MB of padding
SAMPLE_BYTES = 32 * 32 * 3
PER_PAGE = PAGE_BYTES // SAMPLE_BYTES
METADATA_START = 24 + 3 * 1041
METADATA = np.dtype([("image", "V16"), ("label", "<i8"), ("index", "<i8")])
TABLE_ROW_BYTES = 24


def write(files: Mapping[Path, Arrays], timeout_s: float = 600.0) -> None:
    """Write files of the fields image, label and index (the sample's position); return when they are on disk.

    A failed call leaves no file. A killed one leaves incomplete files, so write into a temporary folder and rename.

    Args:
        files: per path, all in one folder, the images uint8 (N, 32, 32, 3) and the labels (N,).
        timeout_s: kill the child after that long; 50,000 images take 2 s.

    Raises:
        DataError: the disk is too small or became full, or the child failed, died or timed out.
        OSError: the folder does not exist or cannot be written.
    """
    folder = next(iter(files)).parent
    needed, free = sum(num_bytes(len(labels)) for _, labels in files.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e6:.1f} MB free, the data needs {needed / 1e6:.1f} MB.\n"
            "Free some space, or choose another folder with --data.dir."
        )
    try:
        _run_child(files, timeout_s)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise


def read_arrays(path: Path) -> tuple[Images, Labels]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of a verified file, in the order of their index."""
    content = np.fromfile(path, np.uint8)
    n = int.from_bytes(content[8:16].tobytes(), "little")
    metadata = content[METADATA_START:][: n * METADATA.itemsize].view(METADATA)
    pages = content[_pages_start(n) : -n * TABLE_ROW_BYTES].reshape(-1, PAGE_BYTES)
    images = pages[:, : PER_PAGE * SAMPLE_BYTES].reshape(-1, 32, 32, 3)[:n]
    return images, metadata["label"].copy()


def num_bytes(n: int) -> int:
    """The size of a file of `n` samples."""
    return _pages_start(n) + -(-n // PER_PAGE) * PAGE_BYTES + n * TABLE_ROW_BYTES


def _pages_start(n: int) -> int:
    return -(-(METADATA_START + n * METADATA.itemsize) // PAGE_BYTES) * PAGE_BYTES


def _run_child(files: Mapping[Path, Arrays], timeout_s: float) -> None:
    """Run this module as a child process, which gets the arrays in memory."""
    parent_lives, held_by_parent = os.pipe()
    try:
        with os.fdopen(os.memfd_create("cifar_dist"), "wb") as content:
            for images, labels in files.values():
                np.save(content, images)
                np.save(content, labels.astype(np.int64))
            content.seek(0)
            command = [sys.executable, "-m", "cifar_dist.data.prepare.beton", str(content.fileno())]
            child = subprocess.run(
                [*command, *(str(path.absolute()) for path in files)], cwd=Path(__file__).parents[3],
                stdin=parent_lives, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[content.fileno()],
                start_new_session=True, timeout=timeout_s, check=False, text=True, errors="replace",
            )  # fmt: skip
        if child.returncode == 0:
            return
        reason = (child.stdout.strip().splitlines() or [f"the writer ended with exit code {child.returncode}"])[-1]
        if child.returncode < 0:
            reason = f"the writer died of signal {-child.returncode} ({signal.strsignal(-child.returncode)})"
    except subprocess.TimeoutExpired:
        reason = f"the writer took more than {timeout_s:g} s and was killed"
    finally:
        os.close(parent_lives)
        os.close(held_by_parent)
    raise DataError(
        f"{' and '.join(map(str, files))} could not be written: {reason}.\n"
        "Nothing was left behind; remove the cause and run again."
    )


# In the child


def _exit_with_parent() -> None:
    os.read(0, 1)  # the parent holds the other end of this pipe and writes nothing, so this returns when it is gone
    os._exit(1)


def _write_with_ffcv(path: str, images: Images, labels: Labels) -> None:
    """DatasetWriter.from_indexed_dataset with its one worker called instead of forked."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter, MemoryAllocator, worker_job_indexed_dataset

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), "index": IntField()}
    writer = DatasetWriter(path, fields, page_size=PAGE_BYTES, num_workers=1)
    writer.num_samples = len(labels)
    writer.prepare()
    writer.metadata_sm.unlink()  # it stays mapped; its name in /dev/shm would outlive a killed process
    allocator = MemoryAllocator(path, writer.data_region_start, PAGE_BYTES)
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    chunks.put([(index, index) for index in range(len(labels))])
    chunks.put(None)
    allocations: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done = multiprocessing.Value("Q", 0)
    samples = list(zip(images, labels.tolist(), range(len(labels)), strict=True))
    worker_job_indexed_dataset(
        chunks, writer.metadata_sm, writer.metadata_type, fields, allocator, done, allocations, samples
    )
    writer.finalize(allocations.get())


def main(fd: int, paths: list[str]) -> None:
    """Write each of `paths` from `fd`, in which np.save wrote its images uint8 (N, 32, 32, 3) and its labels int64."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()  # before the import of FFCV, which takes seconds
    with os.fdopen(fd, "rb") as content:
        for path in paths:
            _write_with_ffcv(path, np.load(content), np.load(content))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
