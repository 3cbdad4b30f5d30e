"""Shared fixtures: the real CIFAR-10, prepared once and then only read. And how tests are dealt out to two workers."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import psutil
import pytest

from cifar_dist.data import cifar10
from cifar_dist.data.prepare import beton, install
from cifar_dist.data.prepare.collection import Bytes, Cifar10
from tests.support import runs

# Asserted numbers are those of CPUs, also on a machine with GPUs. Child processes inherit this.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# What a shell puts in the background, and nohup starts, ignores these signals, and child processes inherit that, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)
REPOSITORY = Path(__file__).parents[1]
# Every process that a test starts inherits it, so that those left at the end are found.
SESSION = "CIFAR_DIST_TEST_SESSION"
SLOW_UNTIL = "CIFAR_DIST_TEST_SLOW_UNTIL"  # in seconds since 1970
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[SESSION] = secrets.token_hex(8)
# The longest groups start first; otherwise one worker ends long before the other.
FIRST = (
    "clock", "test_slurm", "test_elastic", "test_wheel", "test_bundle", "test_versions", "test_world_size",
    "test_cuda_code", "test_bench",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none, and give each file to one worker, as its tests share fixtures.

    Tests that measure seconds are one group, "clock", so that two of them never run at a time. The slow ones of a group
    are a group of their own, after all default tests.
    """
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        without = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in without]
        config.hook.pytest_deselected(items=without)
    ranks = dict[pytest.Item, tuple[bool, int, bool]]()
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        group: str = marker.args[0] if marker else item.path.stem
        slow = item.get_closest_marker("slow") is not None
        item.add_marker(pytest.mark.xdist_group(group + "-slow" * slow), append=False)
        place = FIRST.index(group) if group in FIRST else len(FIRST)
        ranks[item] = slow, place, item.get_closest_marker("run") is None
    items.sort(key=ranks.__getitem__)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip slow tests once the time for them is over, which CI sets, as it has 90 minutes on any machine."""
    if item.get_closest_marker("slow") and time.time() > float(os.environ.get(SLOW_UNTIL, "inf")):
        pytest.skip(f"the time for slow tests is over ({SLOW_UNTIL})")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where groups have no effect, as with a pytest that pytest-xdist does not know yet."""
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist did not put the group of each test into its id; see pyproject.toml")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a process that the tests started still lives."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    deadline = time.monotonic() + 10
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for text in left:
        print(f"\nERROR: left behind by the tests: {text}")
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _left_behind() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(SESSION) == os.environ[SESSION]
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:300]}")
        except psutil.Error:
            continue
    return found


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks run torch's operations alone, as on a GPU, without the machine code for one CPU thread."""
    monkeypatch.setattr("cifar_dist.models.fused.can_use_kernels", lambda _: False)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Fail after a test that left a timer: it may end pytest. Undo `set_num_threads`.

    With two threads in each of two workers, both would wait for each other's processors.
    """
    yield
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes put in here are killed at the end."""
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Call with a name and a function: it fills the folder of that name, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with filelock.FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of the other worker, which failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The repository's data folder, or CIFAR_DIST_TEST_DATA; prepared when missing. Only to be read."""
    path = Path(os.environ.get("CIFAR_DIST_TEST_DATA", REPOSITORY / "data"))
    install.ensure(path, "auto", print)
    return path


@pytest.fixture(scope="session")
def cifar(data_dir: Path) -> Cifar10:
    """The arrays of the real dataset."""
    train_images, train_labels = beton.read_arrays(data_dir / cifar10.TRAIN)
    test_images, test_labels = beton.read_arrays(data_dir / cifar10.TEST)
    return Cifar10(train_images, train_labels.astype("u1"), test_images, test_labels.astype("u1"), str(data_dir))


@pytest.fixture(scope="session")
def binary_dir(cifar: Cifar10, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def short_run(data_dir: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The directory of a whole run with runs.SHORT that nothing disturbed; read it, do not change it."""

    def fill(folder: Path) -> None:
        runs.run(1, *runs.SHORT, "--data.dir", data_dir, "--run.dir", folder / "run")

    return made_once("short", fill) / "run"


@pytest.fixture(scope="session")
def two_ranks(data_dir: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The directory of a whole run of two processes with runs.TWO_RANKS that nothing disturbed; only to be read."""

    def fill(folder: Path) -> None:
        runs.run(2, *runs.TWO_RANKS, "--data.dir", data_dir, "--run.dir", folder / "run")

    return made_once("two-ranks", fill) / "run"


def cifar10_records(images: Bytes, labels: Bytes) -> bytes:
    """The binary version written the slow, obvious way, independent of the code under test."""
    planes = [images[:, :, :, channel].reshape(len(images), 1024) for channel in range(3)]
    return b"".join(
        bytes([label]) + red.tobytes() + green.tobytes() + blue.tobytes()
        for label, red, green, blue in zip(labels.tolist(), *planes, strict=True)
    )
