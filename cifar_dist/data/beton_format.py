"""What a .beton file of this project looks like, byte by byte.

Little-endian, as ffcv.types and ffcv.writer define it: header (24 bytes), a descriptor of 1041 bytes per
field, metadata (32 bytes per sample), zeros up to a multiple of the page size, pages with as many whole
images as fit and zeros after them, and the allocation table (24 bytes per sample) up to the end of the file.
"""

from __future__ import annotations

import numpy as np

VERSION = 2  # of the format, ffcv.types.CURRENT_VERSION
PAGE_BYTES = 1 << 21  # FFCV's smallest page; its default of 8 MiB would add 10 MB of padding
SAMPLE_BYTES = 32 * 32 * 3
PER_PAGE = PAGE_BYTES // SAMPLE_BYTES
NUM_CLASSES = 10
RAW = 1  # image mode: pixels as they are

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
FIELDS = np.array([(2, b"image", 0), (1, b"label", 0), (1, b"index", 0)], FIELD)  # 2: RGBImageField, 1: IntField
METADATA_START = HEADER.itemsize + FIELDS.nbytes


class Layout:
    """Where everything is in a file of `n` samples."""

    def __init__(self, n: int) -> None:
        self.metadata_end = METADATA_START + n * METADATA.itemsize
        self.pages_start = -(-self.metadata_end // PAGE_BYTES) * PAGE_BYTES
        self.table = self.pages_start + -(-n // PER_PAGE) * PAGE_BYTES
        self.size_bytes = self.table + n * ALLOCATION.itemsize
