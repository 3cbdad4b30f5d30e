"""Write .beton files with FFCV, and check and read them without it.

FFCV maps a file and follows its pointers unchecked: a file cut short by one byte gives wrong images with exit
code 0, a zero pointer a segmentation fault. So everything that it will believe is compared here first, with
numpy alone. One writer in one process lays a file out in one way only (see beton_format), so nothing but
pixels and labels may differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from cifar_dist.data.beton_format import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    IMAGE,
    METADATA,
    METADATA_START,
    NUM_CLASSES,
    PAGE_BYTES,
    PER_PAGE,
    RAW,
    SAMPLE_BYTES,
    VERSION,
    Layout,
)
from cifar_dist.data.beton_writer import write_betons
from cifar_dist.errors import DataError

Say = Callable[[str], None]
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_PADDING = "the padding between its parts is not empty"


@dataclass(frozen=True)
class BetonFacts:
    """What a verified file holds; the array digests are of uint8 in C order, as cifar10.ARRAYS_SHA256."""

    num_samples: int
    size_bytes: int
    sha256: str
    images_sha256: str
    labels_sha256: str
    class_counts: tuple[int, ...]


def write_beton(path: Path, images: Images, labels: npt.NDArray[Any], say: Say, stall_s: float = 300) -> None:
    """Write one file; see `beton_writer.write_betons`, which writes several at the cost of one child."""
    write_betons({path: (images, labels)}, say, stall_s)


def verify_beton(path: Path, num_samples: int, sha256: str | None = None) -> BetonFacts:
    """Check all of a file that FFCV will rely on, and its SHA-256 where one is given, before FFCV maps it.

    Raises:
        DataError: names the file, what is wrong with it and what to do.
    """
    with _opened(path) as file:
        head, table, labels = _read_ends(path, file, num_samples)
        whole, of_images = hashlib.sha256(head.data), hashlib.sha256()
        for page, used in _pages(path, file, len(labels)):
            whole.update(page.data)
            of_images.update(page[:used].data)
        whole.update(table.data)
    found = whole.hexdigest()
    if sha256 is not None and found != sha256:
        _refuse(path, f"its SHA-256 is {found}, but its manifest says {sha256}")
    return BetonFacts(
        num_samples=num_samples,
        size_bytes=Layout(num_samples).size_bytes,
        sha256=found,
        images_sha256=of_images.hexdigest(),
        labels_sha256=hashlib.sha256(labels.astype(np.uint8).data).hexdigest(),
        class_counts=tuple(np.bincount(labels, minlength=NUM_CLASSES).tolist()),
    )


def read_labels(path: Path) -> Labels:
    """Labels int64 (N,) of a .beton, in order of their index, without FFCV and without reading the images.

    Raises:
        DataError: the file is damaged, outside its images, or not of the kind that `write_beton` writes.
    """
    with _opened(path) as file:
        return _read_ends(path, file, None)[2]


def read_arrays(path: Path) -> tuple[Images, Labels]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of a .beton, in order of their index, without FFCV.

    Raises:
        DataError: the file is damaged or not of the kind that `write_beton` writes.
    """
    with _opened(path) as file:
        labels = _read_ends(path, file, None)[2]
        images = np.empty((len(labels) * SAMPLE_BYTES,), np.uint8)
        filled = 0
        for page, used in _pages(path, file, len(labels)):
            images[filled : filled + used] = page[:used]
            filled += used
    return images.reshape(-1, 32, 32, 3), labels


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        if not path.is_file():
            _refuse(path, "it is no regular file" if path.exists() else "it is missing")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _read_ends(path: Path, file: FileIO, num_samples: int | None) -> tuple[Images, Images, Labels]:
    """The bytes before the first page, the allocation table, and the labels, all checked."""
    size = os.fstat(file.fileno()).st_size
    n = _check_header(path, file.read(METADATA_START), size, num_samples)
    layout = Layout(n)
    head, table = np.empty(layout.pages_start, np.uint8), np.empty(size - layout.table, np.uint8)
    for start, part in ((0, head), (layout.table, table)):
        file.seek(start)
        _fill(path, file, part)
    labels = _check_metadata(path, head[METADATA_START : layout.metadata_end], table, n)
    if head[layout.metadata_end :].any():
        _refuse(path, _PADDING)
    return head, table, labels


def _pages(path: Path, file: FileIO, n: int) -> Iterator[tuple[Images, int]]:
    """Each page, in a buffer that the next one overwrites, and how many of its bytes are images.

    They are read, not mapped: a mapped file that is truncated kills the process. One buffer serves all pages, as
    memory for 158 MB takes longer to get than to hash.
    """
    page = np.empty(PAGE_BYTES, np.uint8)
    file.seek(Layout(n).pages_start)
    for first in range(0, n, PER_PAGE):
        _fill(path, file, page)
        used = min(PER_PAGE, n - first) * SAMPLE_BYTES
        if page[used:].any():
            _refuse(path, _PADDING)
        yield page, used


def _fill(path: Path, file: FileIO, part: Images) -> None:
    view = part.data
    while view:
        count = file.readinto(view)
        if not count:
            _refuse(path, "it changed while it was being read")
        view = view[count:]


def _check_header(path: Path, head: bytes, size: int, num_samples: int | None) -> int:
    if len(head) < METADATA_START:
        _refuse(path, f"it is cut short: {size:,} bytes")
    header = np.frombuffer(head, HEADER, 1)[0]
    version, num_fields, page_bytes, found, table = (int(header[name]) for name in HEADER.names or ())
    if version != VERSION:
        _refuse(path, f"its header says format version {version}, not {VERSION}; it may be no .beton at all")
    if num_fields != len(FIELDS):
        _refuse(path, f"its header says {num_fields} fields, expected {len(FIELDS)}")
    if page_bytes != PAGE_BYTES:
        _refuse(path, f"its header says pages of {page_bytes:,} bytes, expected {PAGE_BYTES:,}")
    if found < 1 or found != (num_samples or found):
        _refuse(path, f"its header says {found:,} samples, expected {num_samples or 'at least 1'}")
    if np.frombuffer(head, FIELD, len(FIELDS), HEADER.itemsize).tobytes() != FIELDS.tobytes():
        _refuse(path, "its fields are not image (RGB), label (int) and index (int)")
    layout = Layout(found)
    if table != layout.table:
        _refuse(path, f"its header puts the allocation table at byte {table:,}, expected {layout.table:,}")
    if size != layout.size_bytes:
        _refuse(path, f"it has {size:,} bytes, expected {layout.size_bytes:,}: it was cut short or added to")
    return found


def _check_metadata(path: Path, rows: Images, allocations: Images, n: int) -> Labels:
    """Compare metadata and allocation table with the only layout there is; the labels int64 (N,)."""
    layout = Layout(n)
    metadata, table = rows.view(METADATA), allocations.view(ALLOCATION)
    index = np.arange(n)
    pointers = layout.pages_start + index // PER_PAGE * PAGE_BYTES + index % PER_PAGE * SAMPLE_BYTES
    image, unused = metadata["image"], rows.reshape(n, -1)[:, IMAGE.itemsize : 16]
    checks = [
        ("an image mode that is not raw", image["mode"] != RAW),
        ("an image that is not 32x32", (image["width"] != 32) | (image["height"] != 32)),
        ("a label outside 0 to 9", (metadata["label"] < 0) | (metadata["label"] >= NUM_CLASSES)),
        ("an index that is not its position", metadata["index"] != index),
        ("a data pointer to elsewhere than its image", image["pointer"] != pointers.astype(np.uint64)),
        ("bytes in the metadata that belong to no field", unused.any(axis=1)),
        ("another sample's entry in the allocation table", table["sample"] != index.astype(np.uint64)),
        ("a wild pointer in the allocation table", table["pointer"] != pointers.astype(np.uint64)),
        ("a wrong size in the allocation table", table["size"] != SAMPLE_BYTES),
    ]
    for what, wrong in checks:
        if wrong.any():
            first = int(wrong.argmax())
            _refuse(path, f"{int(wrong.sum()):,} of its {n:,} samples, first {first:,}, have {what}")
    return np.ascontiguousarray(metadata["label"])


def advice(folder: Path) -> str:
    """What to do about damaged data in `folder`."""
    return (
        "Put the right file back, or prepare the data anew:\n"
        f"  python -m cifar_dist.prepare --data.dir {folder} --rebuild True"
    )


def _refuse(path: Path, what: str) -> NoReturn:
    raise DataError(f"{path} is not usable: {what}.\n{advice(path.parent)}")
