"""CIFAR-10 put together from images in any order: their digests give the places, six MD5s prove the whole.

The proof is that of the official binary version: six files of 10,000 records, each 1 label byte and 3072 pixel bytes
(red, green, blue plane, row-major). Only a collection that has all six counts.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar_dist.config import NUM_TEST, NUM_TRAIN

Bytes = npt.NDArray[np.uint8]

BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
NUM_IMAGES, PER_FILE, PIXEL_BYTES = NUM_TRAIN + NUM_TEST, 10_000, 3072
# The digests of all images in the official order; tests/support/image_digests.py writes it. No two are equal.
DIGESTS, DIGEST_BYTES = Path(__file__).with_name("image_digests.bin"), 5
BINARY, PYTHON = "binary version", "Python version"  # forms whose files have the official names
_FILE_OF_MD5 = {md5: number for number, md5 in enumerate(BINARY_MD5.values())}
_MAX_PROBLEMS = 3  # shown


@dataclass(frozen=True)
class Cifar10:
    """Images (N, 32, 32, 3) RGB and labels (N,) in the official order, and the source that they are from."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    origin: str


def image_digest(pixels: bytes) -> bytes:
    """Of one image (32, 32, 3) in C order; short, as it only finds the place."""
    return hashlib.sha256(pixels).digest()[:DIGEST_BYTES]


def records_of(images: Bytes, labels: Bytes) -> Bytes:
    """The records (N, 3073) of the binary version."""
    return np.column_stack([labels, images.transpose(0, 3, 1, 2).reshape(len(labels), PIXEL_BYTES)])


def images_of(planes: Bytes) -> Bytes:
    """Images (N, 32, 32, 3) of (N, 3072): red, green and blue planes."""
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@functools.cache
def _places() -> dict[bytes, int]:
    content = DIGESTS.read_bytes()
    return {content[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES]: k for k in range(NUM_IMAGES)}


class Collection:
    """The images found so far at their places, and what else was met, for the message of a failure."""

    def __init__(self) -> None:
        self.images = np.zeros((NUM_IMAGES, 32, 32, 3), np.uint8)
        self.labels = np.zeros(NUM_IMAGES, np.uint8)
        self.found = np.zeros(NUM_IMAGES, bool)
        self.num_found = 0
        self.forms: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()  # pictures with a label that are not CIFAR-10's, by format
        self.unlabelled = 0
        self.problems: dict[str, None] = {}  # one fact each, in the order in which they were met
        self.paths: set[Path] = set()
        self._proved: set[int] = set()
        self._refuted = False

    def add_records(self, records: Bytes, form: str) -> int:
        """Add records of the binary version in any order; return how many are CIFAR-10's."""
        parts = (records[start : start + PER_FILE] for start in range(0, len(records), PER_FILE))
        return sum(self._add(images_of(part[:, 1:]), part[:, 0], part, form) for part in parts)

    def add(self, images: Bytes, labels: Bytes, form: str) -> int:
        """Add images (N, 32, 32, 3) in any order with their labels (N,); return how many are CIFAR-10's."""
        parts = [slice(start, start + PER_FILE) for start in range(0, len(labels), PER_FILE)]
        return sum(self._add(images[part], labels[part], None, form) for part in parts)

    def _add(self, images: Bytes, labels: Bytes, records: Bytes | None, form: str) -> int:
        if len(labels) == PER_FILE:  # a whole file in its order needs no digests of images
            records = records_of(images, labels) if records is None else records
            if (number := _FILE_OF_MD5.get(md5_of(np.ascontiguousarray(records).data))) is not None:
                place = slice(number * PER_FILE, (number + 1) * PER_FILE)
                self.images[place], self.labels[place] = images, labels
                new = PER_FILE - int(self.found[place].sum())
                self.found[place] = True
                self._proved.add(number)
                self.num_found += new
                self.forms[form] += new
                return PER_FILE
        return sum(
            self.place(image.tobytes(), label, form) for image, label in zip(images, labels.tolist(), strict=True)
        )

    def place(self, pixels: bytes, label: int, form: str) -> bool:
        """Add one image (32, 32, 3), by its digest; return whether it is CIFAR-10's."""
        place = self.place_of(pixels)
        if place is None:
            self.foreign[form] += 1
            return False
        if place // PER_FILE not in self._proved:
            self.images[place] = np.frombuffer(pixels, np.uint8).reshape(32, 32, 3)
            self.labels[place] = label
        if not self.found[place]:
            self.found[place] = True
            self.num_found += 1
            self.forms[form] += 1
        return True

    def place_of(self, pixels: bytes) -> int | None:
        return _places().get(image_digest(pixels))

    def complete(self) -> bool:
        """Whether the six files are proved to be CIFAR-10's. Wrong labels are noticed once, not at each image."""
        return self.num_found == NUM_IMAGES and not self._refuted and self.prove()

    def prove(self) -> bool:
        for number, md5 in enumerate(BINARY_MD5.values()):
            place = slice(number * PER_FILE, (number + 1) * PER_FILE)
            if number not in self._proved and self.found[place].all():
                if md5_of(records_of(self.images[place], self.labels[place]).data) == md5:
                    self._proved.add(number)
                else:
                    self._refuted = True
        return len(self._proved) == len(BINARY_MD5)

    def result(self, origin: str) -> Cifar10:
        parts = (part for array in (self.images, self.labels) for part in (array[:NUM_TRAIN], array[NUM_TRAIN:]))
        train_images, test_images, train_labels, test_labels = parts
        return Cifar10(train_images, train_labels, test_images, test_labels, origin)

    def note(self, problem: str) -> None:
        self.problems.setdefault(problem)

    def description(self) -> list[str]:
        """What was found and what is missing, a fact a line."""
        texts = list(self.problems)[:_MAX_PROBLEMS]
        if len(self.problems) > _MAX_PROBLEMS:
            texts.append(f"{len(self.problems) - _MAX_PROBLEMS} more problems of this kind.")
        if self.foreign:
            counts = ", ".join(f"{number:,} {form}{_why(form)}" for form, number in self.foreign.most_common(4))
            texts.append(f"images that are not CIFAR-10's: {counts}.")
        if self.unlabelled:
            texts.append(f"pictures without a label, as no folder or file is named after a class: {self.unlabelled:,}.")
        counts_of_files = dict(zip(BINARY_MD5, self.found.reshape(-1, PER_FILE).sum(axis=1).tolist(), strict=True))
        proved = {name for number, name in enumerate(BINARY_MD5) if number in self._proved}
        if wrong := [name for name, count in counts_of_files.items() if count == PER_FILE and name not in proved]:
            texts.append(f"the labels of images of {', '.join(wrong)} are not CIFAR-10's.")
        missing = [name for name, count in counts_of_files.items() if count < PER_FILE]
        if not self.forms and texts:
            texts.append(f"found: none of CIFAR-10's {NUM_IMAGES:,} images.")
        elif set(self.forms) - {BINARY, PYTHON}:
            forms = ", ".join(f"{form}: {number:,}" for form, number in self.forms.items())
            train, test = (int(part.sum()) for part in (self.found[:NUM_TRAIN], self.found[NUM_TRAIN:]))
            counts = f"{train:,} of {NUM_TRAIN:,} training images, {test:,} of {NUM_TEST:,} test images"
            texts.append(f"found: {counts} ({forms}).")
        elif self.forms and missing:
            texts.append(f"missing or too large: {', '.join(missing)}.")
        return texts


def _why(form: str) -> str:
    reasons = {
        "JPEG": "is lossy",
        "GIF": "has few colours",
        "size": "is not 32 x 32 pixels",
        "damaged": "cannot be read",
    }
    return next((f" ({reason})" for word, reason in reasons.items() if word in form), "")


def md5_of(content: bytes | memoryview) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
