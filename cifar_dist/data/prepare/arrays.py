"""Images and labels in NumPy arrays and parquet tables."""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.data.prepare.collection import PIXEL_BYTES
from cifar_dist.data.prepare.contents import MAX_FILE_BYTES
from cifar_dist.errors import DataError, one_line

Arrays = dict[str, npt.NDArray[Any]]

_SHAPES = ((32, 32, 3), (3, 32, 32), (PIXEL_BYTES,))  # of one image
# What tells images from labels in names like x_train.npy and test_labels.
_ROLE = re.compile(r"images?|imgs?|pixels|labels?|targets?|data|^[xy](?=_|tr|te|$)|[xy]$|[^a-z0-9]")


def is_images(array: npt.NDArray[Any]) -> bool:
    """Whether the shape is that of images."""
    return array.shape[1:] in _SHAPES


def pairs(arrays: Arrays) -> list[tuple[str, str]]:
    """Names of images and of their labels: as many, and of a name that differs by images, labels, x, y and so on."""
    found: dict[str, str] = {}  # images by labels
    for name in [name for name, array in arrays.items() if is_images(array) and array.dtype == np.uint8]:
        fitting = [other for other, array in arrays.items() if _is_labels(array, len(arrays[name]))]
        same = [other for other in fitting if _without_role(other) == _without_role(name)]
        if len(same or fitting) == 1:
            found.setdefault((same or fitting)[0], name)
    return [(images, labels) for labels, images in found.items()]


def _is_labels(array: npt.NDArray[Any], number: int) -> bool:
    return array.size == number and max(array.shape, default=0) == number and array.dtype.kind in "iu"


def _without_role(name: str) -> str:
    return _ROLE.sub("", PurePosixPath(name).stem.lower())


def read_numpy(name: PurePosixPath, content: bytes) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, tokenize.TokenError) as error:
        raise DataError(f"{name} is no intact NumPy file ({one_line(error)}).") from None
    return array


def read_parquet(name: PurePosixPath, content: bytes) -> Iterator[tuple[bytes, int | str]]:
    """Encoded picture and label of each row, as the library `datasets` writes them.

    Raises:
        DataError: pyarrow is not installed, or the table has no such columns.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        command = f"uv pip install --python {sys.executable} pyarrow (or: pip install pyarrow)"
        raise DataError(f"{name} needs pyarrow to be read: {command}, or take another copy.") from None
    if int(pa.__version__.partition(".")[0]) < 15:
        raise DataError(f"{name} is not read with pyarrow {pa.__version__}, which may run code of it: update pyarrow.")
    file = pq.ParquetFile(pa.BufferReader(content))
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > MAX_FILE_BYTES:
        raise DataError(f"{name} is too large unpacked.")
    fields = [(field.name, str(field.type)) for field in file.schema_arrow]
    picture = _column(fields, "img", "image", ("struct<bytes: binary", "binary", "large_binary"))
    label = _column(fields, "label", "labels", ("int", "uint", "string"))
    if picture is None or label is None:
        raise DataError(f"{name} has no columns of pictures and labels.")
    for batch in file.iter_batches(batch_size=100):
        pictures = batch.column(picture)
        pictures = pictures.field("bytes") if pa.types.is_struct(pictures.type) else pictures
        yield from zip(pictures.to_pylist(), batch.column(label).to_pylist(), strict=True)


def _column(fields: list[tuple[str, str]], name: str, other_name: str, types: tuple[str, ...]) -> int | None:
    """The column of one of the names, else the first of the types."""
    fitting = [k for k, (_, kind) in enumerate(fields) if kind.startswith(types)]
    named = [k for k in fitting if fields[k][0] in (name, other_name)]
    return next(iter(named or fitting), None)
