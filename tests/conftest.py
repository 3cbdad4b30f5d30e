"""Shared fixtures: the real CIFAR-10, prepared once and then only read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cifar_dist.data import beton, cifar10, dataset
from tests import runs

# Numbers are asserted for CPUs, several ranks on any machine; child processes inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell starts what it puts in the background with Ctrl-C ignored, and child processes inherit that too.
signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The repository's data folder, or CIFAR_DIST_TEST_DATA; prepared when missing. Only to be read."""
    path = Path(os.environ.get("CIFAR_DIST_TEST_DATA", REPOSITORY / "data"))
    dataset.ensure(path, "auto", print)
    return path


@pytest.fixture(scope="session")
def cifar(data_dir: Path) -> cifar10.Cifar10:
    """The arrays of the real dataset."""
    train_images, train_labels = beton.read_arrays(data_dir / dataset.TRAIN)
    test_images, test_labels = beton.read_arrays(data_dir / dataset.TEST)
    return cifar10.Cifar10(
        train_images, train_labels.astype("u1"), test_images, test_labels.astype("u1"), str(data_dir)
    )


@pytest.fixture(scope="session")
def binary_dir(cifar: cifar10.Cifar10, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding a genuine cifar-10-batches-bin; read it, do not change it."""
    folder = tmp_path_factory.mktemp("source") / "cifar-10-batches-bin"
    folder.mkdir()
    for k in range(5):
        part = slice(k * 10_000, (k + 1) * 10_000)
        records = cifar10_records(cifar.train_images[part], cifar.train_labels[part])
        (folder / f"data_batch_{k + 1}.bin").write_bytes(records)
    (folder / "test_batch.bin").write_bytes(cifar10_records(cifar.test_images, cifar.test_labels))
    return folder


@pytest.fixture(scope="session")
def short_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole run with runs.SHORT that nothing disturbed; read it, do not change it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    runs.run(1, *runs.SHORT, "--data.dir", data_dir, "--run.dir", folder)
    return folder


def cifar10_records(images: cifar10.Bytes, labels: cifar10.Bytes) -> bytes:
    """The binary version written the slow, obvious way, independent of the code under test."""
    planes = [images[:, :, :, channel].reshape(len(images), 1024) for channel in range(3)]
    return b"".join(
        bytes([label]) + red.tobytes() + green.tobytes() + blue.tobytes()
        for label, red, green, blue in zip(labels.tolist(), *planes, strict=True)
    )
