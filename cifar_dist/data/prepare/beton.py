"""Writes and reads .beton files without FFCV; the bytes are those that FFCV's own DatasetWriter writes.

FFCV's writer forks workers and waits forever if one fails on a full disk. The format needs no workers: header, a
descriptor per field, metadata per sample, zeros up to a multiple of the page size, pages of as many whole images as
fit, and an allocation table. All numbers are little-endian.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

PAGE_BYTES = 1 << 21  # FFCV's smallest page; its default of 8 MiB would add 10 MB of padding
SAMPLE_BYTES = 32 * 32 * 3
PER_PAGE = PAGE_BYTES // SAMPLE_BYTES
# The types are those in ffcv.types and ffcv.fields, written out because importing FFCV takes seconds.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_bytes", "<u4"), ("num_samples", "<u8"), ("table_at", "<u8")]
)
RGB_IMAGE, INT = 2, 1  # types of fields
FIELDS = np.array(
    [(RGB_IMAGE, b"image", b""), (INT, b"label", b""), (INT, b"index", b"")],
    [("type", "u1"), ("name", "S16"), ("arguments", "V1024")],
)
METADATA = np.dtype(
    [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8"), ("padding", "V3"),
     ("label", "<i8"), ("index", "<i8")]
)  # fmt: skip
METADATA_START = HEADER.itemsize + FIELDS.nbytes
TABLE = np.dtype([("index", "<u8"), ("pointer", "<u8"), ("num_bytes", "<u8")])
VERSION, RAW = 2, 1  # of the format; the image mode that stores pixels as they are


def write(path: Path, images: Images, labels: npt.NDArray[np.integer[Any]]) -> None:
    """Write a file of the fields image, label and index (the sample's position); return when it is on disk.

    A failed call leaves an incomplete file, so write into a temporary folder and rename.

    Args:
        path: the file, which is replaced.
        images: uint8 (N, 32, 32, 3).
        labels: (N,).

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    n = len(labels)
    index = np.arange(n)
    pages_start = -(-(METADATA_START + n * METADATA.itemsize) // PAGE_BYTES) * PAGE_BYTES
    table_start = pages_start + -(-n // PER_PAGE) * PAGE_BYTES
    pointers = pages_start + index // PER_PAGE * PAGE_BYTES + index % PER_PAGE * SAMPLE_BYTES

    header = np.array((VERSION, len(FIELDS), PAGE_BYTES, n, table_start), HEADER)
    metadata, table = np.zeros(n, METADATA), np.zeros(n, TABLE)
    metadata["mode"], metadata["width"], metadata["height"] = RAW, 32, 32
    metadata["pointer"], metadata["label"], metadata["index"] = pointers, labels, index
    table["index"], table["pointer"], table["num_bytes"] = index, pointers, SAMPLE_BYTES
    with path.open("wb") as file:
        file.write((header.tobytes() + FIELDS.tobytes() + metadata.tobytes()).ljust(pages_start, b"\0"))
        for start in range(0, n, PER_PAGE):
            file.write(images[start : start + PER_PAGE].tobytes().ljust(PAGE_BYTES, b"\0"))
        file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_arrays(path: Path) -> tuple[Images, Labels]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of a verified file, in the order of their index."""
    content = np.fromfile(path, np.uint8)
    n = int(content[: HEADER.itemsize].view(HEADER)["num_samples"][0])
    metadata = content[METADATA_START:][: n * METADATA.itemsize].view(METADATA)
    images = np.lib.stride_tricks.sliding_window_view(content, SAMPLE_BYTES)[metadata["pointer"]]
    return images.reshape(n, 32, 32, 3), metadata["label"].copy()
