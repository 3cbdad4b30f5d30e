"""Writing .beton files, also when something fails, with FFCV itself as the reference."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from cifar_dist.data.cifar10 import FFCV_VERSION
from cifar_dist.data.prepare import beton
from cifar_dist.data.prepare.beton import METADATA, METADATA_START, PAGE_BYTES
from cifar_dist.errors import DataError

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
    beton.write({path: arrays})
    return path


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if is_writer(child)]


def is_writer(process: psutil.Process) -> bool:
    try:
        return "cifar_dist.data.prepare.beton" in process.cmdline()
    except psutil.Error:
        return False


def wait_for(condition: Callable[[], Any], limit_s: float = 30) -> Any:
    until = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return result


def test_written_file(written: Path, arrays: Arrays, capfd: pytest.CaptureFixture[str]) -> None:
    images, labels = arrays
    assert written.stat().st_size == beton.num_bytes(N) == 4 * PAGE_BYTES + 24 * N
    found_images, found_labels = beton.read_arrays(written)
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)
    assert found_images.shape == (N, 32, 32, 3)
    assert found_labels.dtype == np.int64
    assert capfd.readouterr() == ("", "")  # no tqdm


def test_ffcv_writes_and_reads_the_same(written: Path, arrays: Arrays, tmp_path: Path) -> None:
    """FFCV's own DatasetWriter, with its forked worker, gives the same bytes; its Reader reads the same."""
    import ffcv.fields
    import ffcv.reader
    import ffcv.types
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
    assert reader.metadata.dtype.itemsize == METADATA.itemsize
    assert ffcv.types.HeaderType.itemsize + 3 * ffcv.types.FieldDescType.itemsize == METADATA_START
    assert ffcv.types.ALLOC_TABLE_TYPE.itemsize == beton.TABLE_ROW_BYTES


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), pytest.param(682, marks=pytest.mark.slow), 683])
def test_pages_are_full_or_not(n: int, arrays: Arrays, tmp_path: Path) -> None:
    images, labels = arrays[0][:n], arrays[1][:n]
    beton.write({tmp_path / "x.beton": (images, labels)})
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


def test_disk_too_small(small_disk: Path, arrays: Arrays) -> None:
    (small_disk / "other").write_bytes(bytes(8 << 20))
    with pytest.raises(DataError, match=r"has 4\.2 MB free, the data needs 8\.4 MB"):
        beton.write({small_disk / "x.beton": arrays})
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def failing_write(path: Path, arrays: Arrays, timeout_s: float, meddle: Callable[[int], None]) -> DataError:
    """Write while `meddle` is called with the child's process id as soon as there is one."""
    before, errors = segments(), []

    def write() -> None:
        try:
            beton.write({path: arrays}, timeout_s)
        except DataError as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    meddle(wait_for(children)[0])
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert children() == []
    assert not path.exists()
    assert segments() <= before
    (error,) = errors
    return error


def test_disk_becomes_full(small_disk: Path, arrays: Arrays) -> None:
    def fill(_pid: int) -> None:
        (small_disk / "other").write_bytes(bytes(7 << 20))

    error = failing_write(small_disk / "x.beton", arrays, 60, fill)
    assert "No space left on device" in str(error)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_child_is_killed(arrays: Arrays, tmp_path: Path) -> None:
    error = failing_write(tmp_path / "x.beton", arrays, 60, lambda pid: os.kill(pid, signal.SIGKILL))
    assert "the writer died of signal 9 (Killed)" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_child_stops(arrays: Arrays, tmp_path: Path) -> None:
    error = failing_write(tmp_path / "x.beton", arrays, 0.5, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert "the writer took more than 0.5 s and was killed" in str(error)
