"""Writing .beton files, with FFCV itself as the reference."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cifar_dist.data.cifar10 import FFCV_VERSION
from cifar_dist.data.prepare import beton
from cifar_dist.data.prepare.beton import PAGE_BYTES

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
N = 1500  # three pages of 682, 682 and 136 images


def test_version_of_ffcv_is_the_locked_one() -> None:
    lock = Path(__file__).parents[3] / "uv.lock"
    assert f'name = "ffcv"\nversion = "{FFCV_VERSION}"\n' in lock.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, 32, 32, 3), np.uint8), rng.integers(0, 10, N)


@pytest.fixture(scope="module")
def written(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("beton") / "small.beton"
    beton.write(path, *arrays)
    return path


def test_written_file(written: Path, arrays: Arrays) -> None:
    images, labels = arrays
    assert written.stat().st_size == 4 * PAGE_BYTES + 24 * N
    found_images, found_labels = beton.read_arrays(written)
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)
    assert found_images.shape == (N, 32, 32, 3)
    assert found_labels.dtype == np.int64


def test_ffcv_writes_and_reads_the_same(written: Path, arrays: Arrays, tmp_path: Path) -> None:
    """FFCV's own DatasetWriter, with its forked worker, gives the same bytes; its Reader reads the same."""
    import ffcv.fields
    import ffcv.reader
    import ffcv.writer

    own = tmp_path / "own.beton"
    fields = {"image": ffcv.fields.RGBImageField(write_mode="raw"), "label": ffcv.fields.IntField(),
              "index": ffcv.fields.IntField()}  # fmt: skip
    samples = [(image, int(label), index) for index, (image, label) in enumerate(zip(*arrays, strict=True))]
    ffcv.writer.DatasetWriter(str(own), fields, page_size=PAGE_BYTES, num_workers=1).from_indexed_dataset(samples)
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined] # FFCV's worker started it
    assert own.read_bytes() == written.read_bytes()

    reader = ffcv.reader.Reader(str(written))
    assert reader.field_names == ["image", "label", "index"]
    assert reader.num_samples == N
    np.testing.assert_array_equal(reader.metadata["f1"], arrays[1])
    np.testing.assert_array_equal(reader.metadata["f2"], np.arange(N))


@pytest.mark.parametrize("n", [1, 682, 683])
def test_pages_are_full_or_not(n: int, arrays: Arrays, tmp_path: Path) -> None:
    images, labels = arrays[0][:n], arrays[1][:n]
    beton.write(tmp_path / "x.beton", images, labels)
    found_images, found_labels = beton.read_arrays(tmp_path / "x.beton")
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("NOT TESTED: a full disk needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_is_full(small_disk: Path, arrays: Arrays) -> None:
    (small_disk / "other").write_bytes(bytes(8 << 20))
    with pytest.raises(OSError, match="No space left on device"):
        beton.write(small_disk / "x.beton", *arrays)
