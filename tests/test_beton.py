"""Writing .beton files when things go wrong, and refusing damaged ones, with FFCV itself as the reference."""

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

from cifar_dist.data import beton, beton_format
from cifar_dist.data.beton_format import ALLOCATION, HEADER, METADATA, METADATA_START, PAGE_BYTES, Layout
from cifar_dist.errors import DataError

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
N = 1500  # three pages of 682, 682 and 136 images
LAYOUT = Layout(N)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, 32, 32, 3), np.uint8), rng.integers(0, 10, N)


@pytest.fixture(scope="module")
def written(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("beton") / "small.beton"
    said: list[str] = []
    beton.write_beton(path, *arrays, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("FFCV wrote small.beton 8.4 MB in ")
    return path


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if is_writer(child)]


def is_writer(process: psutil.Process) -> bool:
    try:
        return "cifar_dist.data.ffcv_child" in process.cmdline()
    except psutil.Error:
        return False


def wait_for(condition: Callable[[], Any], limit_s: float = 30) -> Any:
    until = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return result


def test_what_is_written(written: Path, arrays: Arrays, capfd: pytest.CaptureFixture[str]) -> None:
    images, labels = arrays
    facts = beton.verify_beton(written, N)
    assert facts.num_samples == N
    assert facts.size_bytes == written.stat().st_size == LAYOUT.size_bytes == 4 * PAGE_BYTES + 24 * N
    assert facts.class_counts == tuple(np.bincount(labels).tolist())
    assert beton.verify_beton(written, N, facts.sha256) == facts
    found_images, found_labels = beton.read_arrays(written)
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)
    assert found_images.shape == (N, 32, 32, 3)
    assert found_labels.dtype == np.int64
    assert capfd.readouterr() == ("", "")  # no tqdm


def test_ffcv_writes_and_reads_the_same(written: Path, arrays: Arrays, tmp_path: Path) -> None:
    """FFCV's own DatasetWriter, with its forked worker, gives the same bytes; its Reader sees what we see."""
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
    assert ffcv.types.CURRENT_VERSION == beton_format.VERSION
    assert ffcv.types.HeaderType.itemsize == HEADER.itemsize
    assert ffcv.types.FieldDescType.itemsize == beton_format.FIELD.itemsize
    assert ffcv.types.ALLOC_TABLE_TYPE.itemsize == ALLOCATION.itemsize


def header(name: str, value: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        np.frombuffer(content, HEADER, 1)[name] = value

    return edit


def metadata(sample: int, *names: str, value: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        row: Any = np.frombuffer(content, METADATA, N, METADATA_START)
        for name in names[:-1]:
            row = row[name]
        row[names[-1]][sample] = value

    return edit


def table(sample: int, name: str, value: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        np.frombuffer(content, ALLOCATION, N, LAYOUT.table)[name][sample] = value

    return edit


def byte(position: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        content[position] ^= 1

    return edit


def cut(size: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        del content[size:]

    return edit


DAMAGE: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "one byte short": (cut(LAYOUT.size_bytes - 1), r"it has 8,424,607 bytes, expected 8,424,608: it was cut"),
    "cut in the table": (cut(LAYOUT.table + 24 * 700), "it was cut short or added to"),
    "cut at the table": (cut(LAYOUT.table), "it was cut short or added to"),
    "cut in the pages": (cut(3 << 20), "it was cut short or added to"),
    "cut in the header": (cut(11), "it is cut short: 11 bytes"),
    "empty": (cut(0), "it is cut short: 0 bytes"),
    "added to": (lambda content: content.extend(bytes(24)), "it was cut short or added to"),
    "version": (header("version", 3), "format version 3, not 2; it may be no .beton"),
    "fields": (header("num_fields", 2), "says 2 fields, expected 3"),
    "page size 0": (header("page_size", 0), "pages of 0 bytes, expected 2,097,152"),
    "page size": (header("page_size", 1 << 22), "pages of 4,194,304 bytes"),
    "fewer samples": (header("num_samples", N - 1), "says 1,499 samples, expected 1500"),
    "no samples": (header("num_samples", 0), "says 0 samples"),
    "huge samples": (header("num_samples", 2**64 - 1), "says 18,446,744,073,709,551,615 samples"),
    "table at 0": (header("table", 0), "allocation table at byte 0, expected 8,388,608"),
    "table beyond": (header("table", 2**64 - 8), "allocation table at byte 18,446,744,073,709,551,608"),
    "field name": (byte(HEADER.itemsize + 1), "its fields are not image"),
    "field type": (byte(HEADER.itemsize), "its fields are not image"),
    "jpg mode": (
        metadata(7, "image", "mode", value=0),
        "1 of its 1,500 samples, first 7, have an image mode",
    ),
    "width": (metadata(7, "image", "width", value=33), "first 7, have an image that is not 32x32"),
    "height": (metadata(7, "image", "height", value=0), "first 7, have an image that is not 32x32"),
    "pointer 0": (metadata(0, "image", "pointer", value=0), "first 0, have a data pointer to elsewhere"),
    "pointer wild": (metadata(1499, "image", "pointer", value=2**64 - 1), "first 1,499, have a data pointer"),
    "pointer swapped": (metadata(3, "image", "pointer", value=PAGE_BYTES), "first 3, have a data pointer"),
    "label 10": (metadata(9, "label", value=10), "first 9, have a label outside 0 to 9"),
    "label -1": (metadata(9, "label", value=-1), "first 9, have a label outside 0 to 9"),
    "index": (metadata(9, "index", value=8), "first 9, have an index that is not its position"),
    "metadata gap": (
        byte(METADATA_START + 14),
        "first 0, have bytes in the metadata that belong to no field",
    ),
    "table pointer 0": (table(5, "pointer", 0), "first 5, have a wild pointer in the allocation table"),
    "table pointer wild": (
        table(5, "pointer", 2**63),
        "first 5, have a wild pointer in the allocation table",
    ),
    "table size": (table(5, "size", 2**40), "first 5, have a wrong size in the allocation table"),
    "table sample": (table(5, "sample", 6), "first 5, have another sample's entry"),
    "gap before pages": (byte(PAGE_BYTES - 1), "the padding between its parts is not empty"),
    "gap after a page": (byte(2 * PAGE_BYTES - 1), "the padding between its parts is not empty"),
    "gap at the end": (byte(LAYOUT.table - 1), "the padding between its parts is not empty"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, written: Path, tmp_path: Path) -> None:
    edit, message = DAMAGE[kind]
    content = bytearray(written.read_bytes())
    edit(content)
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        beton.verify_beton(path, N)
    lines = str(error.value).splitlines()
    assert str(path) in lines[0]
    assert lines[-1] == f"  python -m cifar_dist.prepare --data.dir {tmp_path} --rebuild True"
    if "samples" not in kind:
        with pytest.raises(DataError, match=message):
            beton.read_arrays(path)


def test_flipped_pixel_and_no_file(written: Path, tmp_path: Path) -> None:
    facts = beton.verify_beton(written, N)
    content = bytearray(written.read_bytes())
    content[PAGE_BYTES + 12_345] ^= 1
    path = tmp_path / "flipped.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"its SHA-256 is .* but its manifest says"):
        beton.verify_beton(path, N, facts.sha256)
    found = beton.verify_beton(path, N)
    assert found.images_sha256 != facts.images_sha256
    assert found.labels_sha256 == facts.labels_sha256
    for wrong, message in [(tmp_path / "absent", "it is missing"), (tmp_path, "it is no regular file")]:
        with pytest.raises(DataError, match=message):
            beton.verify_beton(wrong, N)


def test_labels_are_read_without_the_images(written: Path, arrays: Arrays, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    content[PAGE_BYTES : LAYOUT.table] = os.urandom(LAYOUT.table - PAGE_BYTES)
    path = tmp_path / "other-images.beton"
    path.write_bytes(content)
    np.testing.assert_array_equal(beton.read_labels(path), arrays[1])
    metadata(9, "label", value=10)(content)
    path.write_bytes(content)
    with pytest.raises(DataError, match="first 9, have a label outside 0 to 9"):
        beton.read_labels(path)


def test_arguments_are_checked(written: Path, arrays: Arrays, tmp_path: Path) -> None:
    images, labels = arrays
    path, before = tmp_path / "x.beton", written.read_bytes()
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 32, 32, 3\), not float32"):
        beton.write_beton(path, images.astype(np.float32), labels, print)
    with pytest.raises(ValueError, match="images must be"):
        beton.write_beton(path, images[:-1], labels, print)
    with pytest.raises(ValueError, match="labels must be integers"):
        beton.write_beton(path, images, labels + 1, print)
    with pytest.raises(DataError, match="exists already"):
        beton.write_beton(written, images, labels, print)
    assert written.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


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
        beton.write_beton(small_disk / "x.beton", *arrays, say=print)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def failing_write(path: Path, arrays: Arrays, stall_s: float, meddle: Callable[[int], None]) -> DataError:
    """Write while `meddle` is called with the child's process id as soon as there is one."""
    before, errors = segments(), []

    def write() -> None:
        try:
            beton.write_beton(path, *arrays, say=print, stall_s=stall_s)
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


def test_child_stalls(arrays: Arrays, tmp_path: Path) -> None:
    error = failing_write(tmp_path / "x.beton", arrays, 0.5, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert "the writer made no progress for 0.5 s and was killed" in str(error)
