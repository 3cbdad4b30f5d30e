"""Writes .beton files with FFCV in a child process, and reads them without FFCV.

FFCV's own loop forks workers and waits for their counter: it waits forever if a worker dies of a full disk. Here its
worker function runs alone in a child process that the parent watches. An error ends the child, the bytes do not depend
on timing, and FFCV's import and output stay out of this process. 50,000 images take 2 s either way.

The files are little-endian: header (24 bytes), a descriptor of 1041 bytes per field, metadata (32 bytes per sample),
zeros up to a multiple of the page size, pages of as many whole images as fit, and an allocation table (24 bytes per
sample).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.config import NUM_CLASSES
from cifar_dist.errors import DataError

Log = Callable[[str], None]
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

PAGE_BYTES = 1 << 21  # FFCV's smallest page; its default of 8 MiB would add 10 MB of padding
SAMPLE_BYTES = 32 * 32 * 3
PER_PAGE = PAGE_BYTES // SAMPLE_BYTES
METADATA_START = 24 + 3 * 1041
METADATA = np.dtype([("image", "V16"), ("label", "<i8"), ("index", "<i8")])
TABLE_ROW_BYTES = 24


def write(
    files: Mapping[Path, tuple[Images, npt.NDArray[np.integer[Any]]]], log: Log, stall_timeout_s: float = 300.0
) -> None:
    """Write files of the fields image, label and index (the sample's position); return when they are on disk.

    A failed call leaves no file. A killed one leaves incomplete files, so write into a temporary folder and rename.

    Args:
        files: per path the images uint8 (N, 32, 32, 3) and the labels (N,), from 0 to 9.
        stall_timeout_s: kill the child when the files have not grown for that long.

    Raises:
        DataError: a path exists, the disk is too small or became full, or the child failed, died or stalled.
        OSError: a folder does not exist or cannot be written.
        ValueError: the arrays have other shapes, types or values.
    """
    for path, (images, labels) in files.items():
        _check_arrays(path, images, labels)
        if path.exists():
            raise DataError(f"{path} exists already. Move it away first.")
    _check_space(files)
    started = time.monotonic()
    try:
        _run_child(files, stall_timeout_s)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in files)
    log(f"FFCV wrote {sizes} in {time.monotonic() - started:.1f} s")


def read_arrays(path: Path) -> tuple[Images, Labels]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of a file that `write` wrote, in the order of their index.

    Raises:
        DataError: the file cannot be read, or its size does not fit its number of samples.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    n = int.from_bytes(content[8:16].tobytes(), "little")
    if len(content) != num_bytes(n):
        raise DataError(f"{path} has {len(content):,} bytes, expected {num_bytes(n):,} for {n:,} samples.")
    metadata = content[METADATA_START:][: n * METADATA.itemsize].view(METADATA)
    pages = content[_pages_start(n) : -n * TABLE_ROW_BYTES].reshape(-1, PAGE_BYTES)
    images = pages[:, : PER_PAGE * SAMPLE_BYTES].reshape(-1, 32, 32, 3)[:n]
    return images, metadata["label"].copy()


def num_bytes(n: int) -> int:
    """The size of a file of `n` samples."""
    return _pages_start(n) + -(-n // PER_PAGE) * PAGE_BYTES + n * TABLE_ROW_BYTES


def _pages_start(n: int) -> int:
    return -(-(METADATA_START + n * METADATA.itemsize) // PAGE_BYTES) * PAGE_BYTES


def _check_arrays(path: Path, images: Images, labels: npt.NDArray[np.integer[Any]]) -> None:
    if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or len(labels) == 0:
        raise ValueError(f"{path.name}: images must be uint8 (N, 32, 32, 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(f"{path.name}: labels must be integers (N,) from 0 to {NUM_CLASSES - 1}")


def _check_space(files: Mapping[Path, tuple[Images, Any]]) -> None:
    for folder in {path.parent for path in files}:
        needed = sum(num_bytes(len(images)) for path, (images, _) in files.items() if path.parent == folder)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DataError(
                f"{folder} has {free / 1e6:.1f} MB free, the data needs {needed / 1e6:.1f} MB.\n"
                f"Free some space, or choose another folder with --data.dir."
            )


def _run_child(files: Mapping[Path, tuple[Images, Any]], stall_timeout_s: float) -> None:
    """Run this module as a child process. It gets the arrays in memory; its output goes to a temporary file."""
    jobs = json.dumps([(str(path.absolute()), len(labels)) for path, (_, labels) in files.items()])
    root = str(Path(__file__).parents[3])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with os.fdopen(os.memfd_create("cifar_dist"), "wb") as content, tempfile.TemporaryFile() as output:
        for images, labels in files.values():
            content.write(np.ascontiguousarray(images).data)
            content.write(labels.astype(np.int64).data)
        content.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", "cifar_dist.data.prepare.beton", str(content.fileno()), jobs],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=env,
            pass_fds=[content.fileno()], start_new_session=True,
        )  # fmt: skip
        try:
            stalled = _wait(child, list(files), stall_timeout_s)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        if child.returncode == 0:
            return
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if stalled:
        reason = f"the writer made no progress for {stall_timeout_s:g} s and was killed"
    elif child.returncode < 0:
        reason = f"the writer died of signal {-child.returncode} ({signal.strsignal(-child.returncode)})"
    else:
        reason = lines[-1] if lines else f"the writer ended with exit code {child.returncode}"
    names = " and ".join(str(path) for path in files)
    raise DataError(
        f"{names} could not be written: {reason}.\nNothing was left behind; remove the cause and run again."
    )


def _wait(child: subprocess.Popen[bytes], paths: list[Path], stall_timeout_s: float) -> bool:
    """Wait until the child has ended (False), or its files have not grown for `stall_timeout_s` (True)."""
    written, since = -1, time.monotonic()
    while True:
        try:
            child.wait(timeout=0.1)
            return False
        except subprocess.TimeoutExpired:
            now = sum(path.stat().st_size for path in paths if path.exists())
            if now != written:
                written, since = now, time.monotonic()
            elif time.monotonic() - since > stall_timeout_s:
                return True


# In the child


def _exit_with_parent() -> None:
    os.read(0, 1)  # the parent holds the other end of stdin and writes nothing, so this returns when the parent is gone
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


def main(fd: int, jobs: list[tuple[str, int]]) -> None:
    """Write each (path, N) from `fd`, which holds per job the images uint8 (N, 32, 32, 3), then the labels int64."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()  # before the import of FFCV, which takes seconds
    with os.fdopen(fd, "rb") as file:
        content = np.memmap(file, np.uint8, mode="r")
    offset = 0
    for path, n in jobs:
        end = offset + n * SAMPLE_BYTES
        images = content[offset:end].reshape(n, 32, 32, 3)
        offset = end + n * 8
        _write_with_ffcv(path, images, content[end:offset].view(np.int64))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
