"""The prepared folder: complete or absent, whatever happens to it or to the process that prepares it."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_dist.data import cifar10
from cifar_dist.data.prepare import beton, install
from cifar_dist.data.prepare.beton import METADATA, METADATA_START, PAGE_BYTES
from cifar_dist.errors import DataError

pytestmark = pytest.mark.data
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage; train.beton is a hard link or a copy, replaced and not written to."""
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        (folder / cifar10.TRAIN).hardlink_to(data_dir / cifar10.TRAIN)
    except OSError:
        shutil.copy(data_dir / cifar10.TRAIN, folder)
    shutil.copy(data_dir / cifar10.TEST, folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def assert_refused(folder: Path, message: str) -> None:
    """Refused on one screen, with what to do, and nothing was touched."""
    before = state(folder)
    with pytest.raises(DataError, match=message) as error:
        install.ensure(folder, "auto", print)
    assert state(folder) == before
    text = str(error.value)
    assert str(folder) in text
    assert len(text.splitlines()) <= 8
    assert f"prepare --data.dir {folder} --rebuild True" in text


def edit_test_file(folder: Path, edit: Callable[[bytearray], None]) -> None:
    content = bytearray((folder / cifar10.TEST).read_bytes())
    edit(content)
    (folder / cifar10.TEST).write_bytes(content)


def test_prepared_data_verifies(data_dir: Path) -> None:
    lines: list[str] = []
    before = state(data_dir)
    install.ensure(data_dir, "auto", lines.append)
    assert state(data_dir) == before
    assert len(lines) == 1
    assert lines[0].startswith(f"dataset {data_dir}: verified 192 MB in ")


def test_manifest_of_an_earlier_version_is_ignored(copy: Path) -> None:
    (copy / "manifest.json").write_text("{}")
    before = state(copy)
    install.ensure(copy, "auto", print)
    assert state(copy) == before


def swap_labels(content: bytearray) -> None:
    labels = np.frombuffer(content, METADATA, 10_000, METADATA_START)["label"]
    labels[0], labels[1] = labels[1], labels[0]  # 3 and 8: in range and still balanced


def flip_pixel(content: bytearray) -> None:
    content[3 * PAGE_BYTES + 1] ^= 1


def another_dataset(content: bytearray) -> None:
    pages = np.frombuffer(content, np.uint8)[PAGE_BYTES : PAGE_BYTES + 682 * 3072]
    pages[:] = pages[::-1].copy()


def zero_table(content: bytearray) -> None:
    content[16:24] = bytes(8)  # FFCV would follow it and crash


DAMAGE: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "cut by a byte": (bytearray.pop, "it has 33,794,431 bytes, expected 33,794,432: it was cut short"),
    "added to": (lambda content: content.append(0), "it has 33,794,433 bytes, expected 33,794,432"),
    "empty": (bytearray.clear, "it has 0 bytes"),
    "zero table": (zero_table, "its SHA-256 is .*, expected bdd4c762"),
    "flipped pixel": (flip_pixel, "its SHA-256 is .*, expected bdd4c762"),
    "swapped labels": (swap_labels, "its SHA-256 is .*, expected bdd4c762"),
    "another dataset": (another_dataset, "its SHA-256 is .*, expected bdd4c762"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, copy: Path) -> None:
    edit, message = DAMAGE[kind]
    edit_test_file(copy, edit)
    assert_refused(copy, rf"test\.beton is not usable: {message}")


def test_swapped_files_are_refused(copy: Path) -> None:
    (copy / cifar10.TEST).rename(copy / "kept")
    (copy / cifar10.TRAIN).rename(copy / cifar10.TEST)
    (copy / "kept").rename(copy / cifar10.TRAIN)
    assert_refused(copy, r"test\.beton is not usable: it has 158,486,400 bytes")


def test_unreadable_file_is_refused(copy: Path) -> None:
    (copy / cifar10.TEST).unlink()
    (copy / cifar10.TEST).symlink_to(copy / "gone")
    with pytest.raises(DataError, match=r"test\.beton is not usable: it cannot be read: No such file"):
        install.ensure(copy, "auto", print)


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cifar")):
        with pytest.raises(DataError, match=r"data\.dir .* cannot be prepared: (.|\n)*--data\.dir DIR"):
            install.ensure(path, "auto", print)
    assert (tmp_path / "file").read_bytes() == b"mine"
    with pytest.raises(DataError, match="does not exist"):
        install.ensure(tmp_path / "new", str(tmp_path / "nowhere"), print)
    assert names(tmp_path / "new") == [".prepare.lock"]


@pytest.fixture
def read_only(copy: Path) -> Iterator[Path]:
    for options in (["--bind", str(copy), str(copy)], ["-o", "remount,bind,ro", str(copy)]):
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("NOT TESTED: a read-only folder needs the right to mount")
    yield copy
    subprocess.run(["umount", str(copy)], check=True)


def test_read_only_folder(read_only: Path) -> None:
    install.ensure(read_only, "auto", print)
    with pytest.raises(DataError, match="Read-only file system"):
        install.ensure(read_only, "auto", print, rebuild=True)


def test_a_faulty_disk_is_noticed(binary_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = beton.write

    def write_otherwise(path: Path, *arrays: Any) -> None:
        write(path, *arrays)
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(beton, "write", write_otherwise)
    with pytest.raises(DataError, match=r"cannot be prepared: train\.beton, just written, is wrong: its SHA-256 "):
        install.ensure(tmp_path / "data", str(binary_dir), print)
    assert names(tmp_path / "data") == [".prepare.lock"]


# Preparing, by the command itself


def prepare(folder: Path, source: Path, *more: str) -> subprocess.Popen[str]:
    options = ["--data.dir", str(folder), "--data.source", str(source), *more]
    command = [sys.executable, "-m", "cifar_dist.prepare", *options]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(condition: Callable[[], Any], limit_s: float = 30) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


COMPLETE = [".prepare.lock", "test.beton", "train.beton"]


def kill_as_soon_as(condition: Callable[[], Any], folder: Path, source: Path) -> None:
    process = prepare(folder, source)
    wait_for(condition)
    process.kill()
    output, _ = process.communicate()
    assert install.missing(folder) == ["train.beton", "test.beton"], output


def test_killed_then_two_at_once(binary_dir: Path, tmp_path: Path) -> None:
    """Killed while it reads the source, and again when it has written 1 to 100 MB; then a foreign file is there."""
    folder = tmp_path / "data"
    kill_as_soon_as(lambda: list(folder.glob(".partial-*")), folder, binary_dir)
    enough = random.SystemRandom().randint(1_000_000, 100_000_000)
    print(f"killed as soon as {enough} bytes are written")
    partial = f".partial-*/{cifar10.TRAIN}"
    kill_as_soon_as(lambda: sum(path.stat().st_size for path in folder.glob(partial)) >= enough, folder, binary_dir)
    (folder / cifar10.TRAIN).write_bytes(b"somebody's own")

    both = [prepare(folder, binary_dir) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""]
    (first, second) = sorted((out for out, _ in outputs), key=lambda out: "waiting" in out)
    assert first.count(" matches\n") == 6
    assert "prepared from" in first
    assert "train.beton was there, is not CIFAR-10's, and is moved to" in first
    assert "mean 0.4914 0.4822 0.4465, std 0.2470 0.2435 0.2616" in first
    assert second.count("another process is preparing it; waiting") == 1
    assert "verified 192 MB" in second
    assert "matches" not in second
    (aside,) = folder.glob("set-aside-*")
    assert (aside / cifar10.TRAIN).read_bytes() == b"somebody's own"
    assert names(folder) == sorted([*COMPLETE, aside.name])
    install.ensure(folder, "auto", print)


def test_the_command_refuses_damage(copy: Path, binary_dir: Path) -> None:
    edit_test_file(copy, flip_pixel)
    before = state(copy)
    process = prepare(copy, binary_dir)
    _, error = process.communicate(timeout=60)
    assert process.returncode == DataError.exit_code
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert state(copy) == before


def test_a_killed_preparation_is_completed(copy: Path, binary_dir: Path) -> None:
    """Killed between the two renames: the file that is there is right, and is no reason to set it aside."""
    (copy / cifar10.TEST).unlink()
    install.ensure(copy, str(binary_dir), print)
    assert names(copy) == COMPLETE


@pytest.mark.slow
def test_damaged_data_is_rebuilt(copy: Path, binary_dir: Path) -> None:
    edit_test_file(copy, flip_pixel)
    process = prepare(copy, binary_dir, "--rebuild", "True")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert names(copy) == COMPLETE
    install.ensure(copy, "auto", print)


def test_interrupted_by_the_terminal(binary_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = prepare(folder, binary_dir)
    wait_for(lambda: list(folder.glob(f".partial-*/{cifar10.TRAIN}")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert names(folder) == [".prepare.lock"]


def test_small_disk_is_refused_before_a_download(binary_dir: Path, tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a full disk needs the right to mount a tmpfs")
    try:
        with pytest.raises(DataError, match=r"no room for 192 MB .*\n.* 400 MB free"):
            install.ensure(tmp_path / "data", str(binary_dir), print)
        assert names(tmp_path / "data") == [".prepare.lock"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_written_file_is_the_official_order(data_dir: Path, binary_dir: Path) -> None:
    images, labels = beton.read_arrays(data_dir / cifar10.TEST)
    record = np.frombuffer((binary_dir / "test_batch.bin").read_bytes(), np.uint8).reshape(10_000, 3073)
    np.testing.assert_array_equal(labels, record[:, 0])
    np.testing.assert_array_equal(images[77, :, :, 2].ravel(), record[77, 1 + 2048 :])
