"""Images and labels in NumPy arrays, MATLAB files and tables (parquet, Arrow)."""

import io
import math
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.data.prepare.collection import PIXEL_BYTES
from cifar_dist.data.prepare.contents import MAX_FILE_BYTES, one_line
from cifar_dist.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]

_SHAPES = ((32, 32, 3), (3, 32, 32), (PIXEL_BYTES,))  # of one image
# What tells images from labels in names like x_train.npy and test_labels.
_ROLE = re.compile(r"images?|imgs?|pixels|labels?|targets?|data|^[xy](?=_|tr|te|$)|[xy]$|[^a-z0-9]")
_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"


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


def read_numpy(content: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def read_matlab(name: PurePosixPath, content: bytes) -> Arrays:
    """The arrays of a MATLAB file: the official MATLAB version has data and labels."""
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    try:
        names = [array for array, shape, kind in whosmat(io.BytesIO(content)) if kind in ("uint8", "double")
                 and math.prod(shape) <= MAX_FILE_BYTES // 8]  # fmt: skip
        arrays = loadmat(io.BytesIO(content), variable_names=names)
    except (MatReadError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name} is no intact MATLAB file ({one_line(error)}).") from None
    return {array: arrays[array] for array in names}


def is_table(head: bytes, name: PurePosixPath) -> bool:
    return head.startswith((_PARQUET, _ARROW_FILE)) or name.suffix == ".arrow"


def read_table(name: PurePosixPath, content: bytes) -> Iterator[tuple[bytes, int | str]]:
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
    batches: Any  # of rows, with a schema
    source = pa.BufferReader(content)
    if content.startswith(_PARQUET):
        file = pq.ParquetFile(source)
        schema, batches = file.schema_arrow, file.iter_batches(batch_size=1000)
    elif content.startswith(_ARROW_FILE):
        file = pa.ipc.open_file(source)
        schema, batches = file.schema, (file.get_batch(k) for k in range(file.num_record_batches))
    else:
        batches = pa.ipc.open_stream(source)
        schema = batches.schema
    fields = [(field.name, str(field.type)) for field in schema]
    picture = _column(fields, "img", "image", ("struct<bytes: binary", "binary", "large_binary"))
    label = _column(fields, "label", "labels", ("int", "uint", "string"))
    if picture is None or label is None:
        raise DataError(f"{name} has no columns of pictures and labels.")
    for batch in batches:
        pictures = batch.column(picture)
        pictures = pictures.field("bytes") if pa.types.is_struct(pictures.type) else pictures
        yield from zip(pictures.to_pylist(), batch.column(label).to_pylist(), strict=True)


def _column(fields: list[tuple[str, str]], name: str, other_name: str, types: tuple[str, ...]) -> int | None:
    """The column of one of the names, else the first of the types."""
    fitting = [k for k, (_, kind) in enumerate(fields) if kind.startswith(types)]
    named = [k for k in fitting if fields[k][0] in (name, other_name)]
    return next(iter(named or fitting), None)
