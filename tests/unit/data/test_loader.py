"""FFCV behind our loader, on the real test.beton: content, order, lifetime, failures and threads."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffcv.loader.epoch_iterator import EpochIterator

from cifar_dist.data.loader import Batch, BetonLoader, ReadingThread, read_labels
from cifar_dist.data.prepare.collection import Cifar10
from cifar_dist.errors import DataError, UserError
from tests.support import runs

CPU = torch.device("cpu")
NUM = 10_000


def num_reading_threads() -> int:
    return sum(isinstance(thread, ReadingThread) for thread in threading.enumerate())


@pytest.fixture(scope="module")
def loader(data_dir: Path) -> Iterator[BetonLoader]:
    with BetonLoader(data_dir / "test.beton", CPU) as loader:
        yield loader


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert num_reading_threads() == 0


def check(batches: list[Batch], cifar: Cifar10, order: Any) -> None:
    """The batches together are the samples of `order`, pixel by pixel."""
    assert np.array_equal(torch.cat([batch.indices for batch in batches]).numpy(), order)
    assert np.array_equal(torch.cat([batch.labels for batch in batches]).numpy(), cifar.test_labels[order])
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    assert np.array_equal(images.numpy(), cifar.test_images[order])


def test_content_in_any_order(loader: BetonLoader, cifar: Cifar10) -> None:
    """Also that batches stay what they are: all are kept, and FFCV has room for five only."""
    for seed, batch_size in ((0, 512), (1, 100)):
        order = np.random.default_rng(seed).permutation(NUM)
        batches = list(loader.read(order, batch_size))
        assert [len(batch.labels) for batch in batches] == [
            min(batch_size, NUM - start) for start in range(0, NUM, batch_size)
        ]
        check(batches, cifar, order)


def test_dtypes_and_layout(loader: BetonLoader) -> None:
    (batch,) = loader.read(np.arange(7), 7)
    assert batch.images.shape == (7, 3, 32, 32)
    assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.shape == batch.indices.shape == (7,)


def test_small_batches(loader: BetonLoader, cifar: Cifar10) -> None:
    order = np.array([9_999, 0, 5, 5, 17])
    singles = list(loader.read(order, 1))
    assert [tuple(batch.images.shape) for batch in singles] == [(1, 3, 32, 32)] * 5
    assert [tuple(batch.labels.shape) for batch in singles] == [(1,)] * 5
    check(singles, cifar, order)
    larger = list(loader.read(order, 64))
    assert [len(batch.labels) for batch in larger] == [5]
    check(larger, cifar, order)
    assert list(loader.read(order[:0], 64)) == []


def test_another_file_by_the_same_code(loader: BetonLoader, data_dir: Path, cifar: Cifar10) -> None:
    """And both at once."""
    samples = np.array([9_999, 0, 5, 4_321])
    with loader.for_file(data_dir / "train.beton") as other:
        for mine, others in zip(loader.read(samples, 2), other.read(samples + 40_000, 2), strict=True):
            check([mine], cifar, mine.indices.numpy())
            indices = others.indices.numpy()
            assert np.array_equal(indices, mine.indices.numpy() + 40_000)
            assert np.array_equal(others.labels.numpy(), cifar.train_labels[indices])
            assert np.array_equal(others.images.permute(0, 2, 3, 1).numpy(), cifar.train_images[indices])
        with pytest.raises(ValueError, match="in a file of 50000 samples"):
            next(other.read(np.array([50_000]), 1))


@pytest.mark.parametrize("cache", ["read-only", "full", "damaged"])
def test_without_a_cache_of_compiled_code(cache: str, data_dir: Path, tmp_path: Path) -> None:
    """Numba keeps FFCV's function that finds a sample's bytes; where it cannot, the function is compiled anew."""
    program = (
        "import numpy as np, sys, torch\nfrom pathlib import Path\nfrom cifar_dist.data.loader import BetonLoader\n"
        "with BetonLoader(Path(sys.argv[1]), torch.device('cpu')) as loader:\n"
        "    print([batch.labels.tolist() for batch in loader.read(np.arange(4), 4)])"
    )
    folder = tmp_path / "cache"
    folder.mkdir()
    words = [sys.executable, "-c", program, str(data_dir / "test.beton")]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    if cache == "damaged":
        subprocess.run(words, env=environment, check=True, cwd=runs.REPOSITORY)
        files = [path for path in folder.rglob("*.nb?") if path.is_file()]
        assert len(files) == 2  # so it is used
        for path in files:
            path.write_bytes(path.read_bytes()[:-40])
    else:
        mount = {
            "read-only": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
            "full": 'mount -t tmpfs -o size=8k tmpfs "$0"',
        }[cache]
        enter = ["unshare", "--mount", "sh", "-c", f'{mount} || exit 99; exec "$@"', str(folder)]
        if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
            pytest.skip("NOT TESTED: a cache that cannot be written, as this user may not mount one")
        words = [*enter, *words]
    output = subprocess.check_output(words, env=environment, text=True, cwd=runs.REPOSITORY)
    assert output == "[[3, 8, 8, 0]]\n"  # the test set's first images: cat, ship, ship, airplane


@pytest.mark.parametrize("index", [-1, NUM, 10**9])
def test_index_outside_the_file(loader: BetonLoader, index: int) -> None:
    with pytest.raises(ValueError, match="in a file of 10000 samples"):
        next(loader.read(np.array([3, index]), 2))


@pytest.mark.parametrize("num_batches", [2, 4, 30])
def test_leaving_early_leaks_nothing(loader: BetonLoader, cifar: Cifar10, num_batches: int) -> None:
    """The rest of the epoch fits into FFCV's queue of three batches, or not."""
    order = np.random.default_rng(0).permutation(NUM)[: num_batches * 100]
    threads = threading.active_count()
    for attempt in range(6):
        reading = loader.read(order, 100)
        check([next(reading)], cifar, order[:100])
        if attempt % 2:
            reading.close()
        else:
            del reading
            gc.collect()
        assert num_reading_threads() == 0
        assert threading.active_count() == threads


def test_consumer_that_fails(loader: BetonLoader) -> None:
    def consume() -> None:
        for _ in loader.read(np.arange(NUM), 100):
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()
    gc.collect()
    assert num_reading_threads() == 0


def test_leaving_the_loader_ends_its_readings(data_dir: Path, loader: BetonLoader) -> None:
    before = list(loader.read(np.arange(10), 10))
    with BetonLoader(data_dir / "test.beton", CPU) as other:
        readings = [other.read(np.arange(NUM), 100) for _ in range(3)]
        for reading in readings:
            next(reading)
        assert num_reading_threads() == 3
    assert num_reading_threads() == 0
    (after,) = loader.read(np.arange(10), 10)
    assert torch.equal(before[0].images, after.images)


def test_two_readings_at_once(loader: BetonLoader, cifar: Cifar10) -> None:
    """Training and validation may read at the same time, in batches of different sizes."""
    generator = np.random.default_rng(3)
    first, second = generator.permutation(NUM)[:3000], generator.permutation(NUM)[:3000]
    taken: tuple[list[Batch], list[Batch]] = ([], [])
    readings = (loader.read(first, 100), loader.read(second, 75))
    for turn in range(40):
        for batches, reading in zip(taken, readings, strict=True):
            if turn < 30 or reading is readings[1]:
                batches.append(next(reading))
    for reading in readings:
        assert list(reading) == []
    check(taken[0], cifar, first)
    check(taken[1], cifar, second)


@pytest.mark.parametrize("fails_at", [0, 2])
def test_failure_in_the_reading_thread(loader: BetonLoader, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    genuine = EpochIterator.run_pipeline

    def run_pipeline(self: Any, b_ix: int, *rest: Any) -> Any:
        if b_ix == fails_at:
            raise OSError(5, "Input/output error")
        return genuine(self, b_ix, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", run_pipeline)
    reading = loader.read(np.arange(NUM), 100)
    assert [len(next(reading).labels) for _ in range(fails_at)] == [100] * fails_at
    with pytest.raises(DataError, match="Input/output error") as caught:  # FFCV's own would wait for ever
        next(reading)
    assert isinstance(caught.value.__cause__, OSError)
    assert "test.beton" in str(caught.value)


def test_torch_keeps_its_threads(data_dir: Path) -> None:
    """FFCV sets torch's thread count to its own number of workers, 1, at construction and in every thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with BetonLoader(data_dir / "test.beton", CPU) as other:
            assert torch.get_num_threads() == 3
            reading = other.read(np.arange(1000), 10)
            for _ in range(5):
                next(reading)
                assert torch.get_num_threads() == 3
            reading.close()
            assert torch.get_num_threads() == 3
            list(other.read(np.arange(1000), 100))
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_more_workers_than_processors(data_dir: Path) -> None:
    available = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=f"data.num_workers is {available + 1}; this process may use {available}"):
        BetonLoader(data_dir / "test.beton", CPU, num_workers=available + 1)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_labels_are_read_without_the_images(data_dir: Path, cifar: Cifar10) -> None:
    before = bytes_read()
    labels = read_labels(data_dir / "train.beton")
    assert bytes_read() - before < 5_000_000  # of 158 MB
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, cifar.train_labels)


def test_a_thread_that_waits_without_end_is_left_behind(loader: BetonLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a kernel on a GPU that never ends. Others are waited for, see `no_thread_left`."""
    kernel, good = threading.Event(), ReadingThread.run_pipeline

    def run_pipeline(self: ReadingThread, *arguments: Any) -> Any:
        if arguments[0] == 2:
            kernel.wait()
        return good(self, *arguments)

    monkeypatch.setattr(ReadingThread, "run_pipeline", run_pipeline)
    batches = loader.read(np.arange(500), 100)
    next(batches)
    started = time.monotonic()
    batches.close()
    assert 0.9 < time.monotonic() - started < 4
    kernel.set()
    deadline = time.monotonic() + 10
    while num_reading_threads() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_order_of_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be seen without one: the thread chooses its device first, and a slot's first copy waits for the main
    stream, whose memory it may get."""
    calls, events = list[Any](), list[Any]()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, torch.device("cuda", 1)

        def wait_stream(self, other: Stream) -> None:
            calls.append((self.name, "waits for", other.name))

        def synchronize(self) -> None:
            calls.append((self.name, "synchronized"))

    reading = ReadingThread.__new__(ReadingThread)
    reading.current_stream, reading.cuda_streams = Stream("main"), [Stream("slot 0")]
    reading.terminate_event, reading.closed = threading.Event(), True
    events += [None, Stream("event of slot 0")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(EpochIterator, "run", lambda self: [self.run_pipeline(0, [], 0, event) for event in events])
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda *_: calls.append("pipeline"))
    reading.run()
    assert reading.__dict__.get("failure") is None
    assert calls == [
        torch.device("cuda", 1), ("slot 0", "waits for", "main"), "pipeline", ("event of slot 0", "synchronized"),
        "pipeline",
    ]  # fmt: skip
