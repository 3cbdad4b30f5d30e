"""The prepared folder: complete or absent, whatever is done to it or to the process that prepares it."""

from __future__ import annotations

import hashlib
import json
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
import psutil
import pytest

from cifar_dist.data import beton, cifar10, dataset
from cifar_dist.data.beton_format import HEADER, METADATA, METADATA_START, PAGE_BYTES, Layout
from cifar_dist.errors import DataError

pytestmark = pytest.mark.data
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage; train.beton is a hard link or a copy, replaced and not written to."""
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        (folder / dataset.TRAIN).hardlink_to(data_dir / dataset.TRAIN)
    except OSError:
        shutil.copy(data_dir / dataset.TRAIN, folder)
    shutil.copy(data_dir / dataset.TEST, folder)
    shutil.copy(data_dir / dataset.MANIFEST, folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def refused(folder: Path, message: str) -> None:
    """Refused on one screen, with what to do, and nothing was touched."""
    before = state(folder)
    with pytest.raises(DataError, match=message) as error:
        dataset.ensure(folder, "auto", print)
    assert state(folder) == before
    text = str(error.value)
    assert str(folder) in text
    assert len(text.splitlines()) <= 8
    assert "prepare --data.dir" in text


def edit_test_file(folder: Path, edit: Callable[[bytearray], None]) -> None:
    content = bytearray((folder / dataset.TEST).read_bytes())
    edit(content)
    (folder / dataset.TEST).write_bytes(content)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((folder / dataset.MANIFEST).read_text())
    edit(tree)
    (folder / dataset.MANIFEST).write_text(json.dumps(tree))


def fix_digest(folder: Path) -> None:
    """What someone would do who wants the damage to pass."""

    def edit(tree: dict[str, Any]) -> None:
        for name in dataset.COUNTS:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            tree["files"][name]["sha256"] = digest

    edit_manifest(folder, edit)


def test_prepared_data_verifies(data_dir: Path, cifar: cifar10.Cifar10) -> None:
    said: list[str] = []
    before = state(data_dir)
    manifest = dataset.ensure(data_dir, "auto", said.append)
    assert state(data_dir) == before
    assert len(said) == 1
    assert said[0].startswith(f"dataset {data_dir}: verified 192 MB in ")
    assert manifest.files["train.beton"]["num_samples"] == 50_000
    assert manifest.files["test.beton"]["num_samples"] == 10_000
    assert sum(entry["size_bytes"] for entry in manifest.files.values()) == 158_486_400 + 33_794_432
    assert manifest.arrays_sha256 == cifar10.ARRAYS_SHA256
    assert manifest.binary_md5 == cifar10.BINARY_MD5
    assert (manifest.mean, manifest.std) == cifar10.statistics(cifar.train_images)
    assert set(manifest.versions) == {"ffcv", "numpy", "python"}
    assert manifest.origin


def swap_labels(content: bytearray) -> None:
    labels = np.frombuffer(content, METADATA, 10_000, METADATA_START)["label"]
    labels[0], labels[1] = labels[1], labels[0]  # 3 and 8: in range and still balanced


def header_count(content: bytearray) -> None:
    np.frombuffer(content, HEADER, 1)["num_samples"] = 9_999


def zero_table(content: bytearray) -> None:
    np.frombuffer(content, HEADER, 1)["table"] = 0


def wild_pointer(content: bytearray) -> None:
    np.frombuffer(content, METADATA, 10_000, METADATA_START)["image"]["pointer"][5000] = 2**63 + 5


def label_ten(content: bytearray) -> None:
    np.frombuffer(content, METADATA, 10_000, METADATA_START)["label"][5000] = 10


def flip_pixel(content: bytearray) -> None:
    content[3 * PAGE_BYTES + 1] ^= 1


def cut_byte(content: bytearray) -> None:
    content.pop()


def cut_table(content: bytearray) -> None:
    del content[Layout(10_000).table + 24 * 5_000 :]


DAMAGE: dict[str, tuple[Callable[[bytearray], None], str, str]] = {
    "cut by a byte": (cut_byte, "it was cut short", "it was cut short"),
    "cut in the table": (cut_table, "it was cut short", "it was cut short"),
    "header count": (header_count, "says 9,999 samples, expected 10000", "says 9,999 samples"),
    "zero table": (zero_table, "allocation table at byte 0", "allocation table at byte 0"),
    "wild pointer": (wild_pointer, "first 5,000, have a data pointer", "first 5,000, have a data pointer"),
    "label 10": (label_ten, "first 5,000, have a label outside", "first 5,000, have a label outside"),
    "flipped pixel": (flip_pixel, "its SHA-256 is", "its images are not those of CIFAR-10's test set"),
    "swapped labels": (swap_labels, "its SHA-256 is", "its labels are not those of CIFAR-10's test set"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_even_with_the_digest_fixed(kind: str, copy: Path) -> None:
    edit, message, message_when_fixed = DAMAGE[kind]
    edit_test_file(copy, edit)
    refused(copy, rf"test\.beton(.|\n)*{message}")
    fix_digest(copy)
    refused(copy, rf"test\.beton(.|\n)*{message_when_fixed}")


def test_missing_and_swapped_files(copy: Path) -> None:
    (copy / dataset.TEST).rename(copy / "kept")
    refused(copy, r"test\.beton is not usable: it is missing")
    (copy / dataset.TRAIN).rename(copy / dataset.TEST)
    (copy / "kept").rename(copy / dataset.TRAIN)
    refused(copy, r"test\.beton is not usable: its header says 50,000 samples, expected 10000")
    fix_digest(copy)
    refused(copy, r"test\.beton is not usable: its header says 50,000 samples, expected 10000")


def test_another_dataset_is_refused(copy: Path) -> None:
    """Other pictures of the same shape and count, with a manifest that fits them."""
    content = bytearray((copy / dataset.TEST).read_bytes())
    pages = np.frombuffer(content, np.uint8)[PAGE_BYTES : PAGE_BYTES + 682 * 3072]
    pages[:] = pages[::-1].copy()
    (copy / dataset.TEST).write_bytes(content)
    fix_digest(copy)
    edit_manifest(copy, lambda tree: tree["arrays_sha256"].update(test_images="0" * 64))
    refused(copy, "arrays_sha256 is .* expected")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda tree: tree.update(format="2"), r"format is '2', expected 'cifar_dist CIFAR-10, format 1'"),
    "missing key": (lambda tree: tree.pop("std"), "it must hold the keys format, files, arrays_sha256"),
    "more keys": (lambda tree: tree.update(x=1), "it must hold the keys"),
    "mean": (lambda tree: tree.update(mean=[0.5, 0.5, 0.5]), r"mean is \[0.5, 0.5, 0.5\], expected"),
    "md5": (lambda tree: tree["binary_md5"].popitem(), "binary_md5 is"),
    "count": (lambda tree: tree["files"]["test.beton"].update(num_samples=9), r"test\.beton is .*'num_samples': 9"),
    "digest": (lambda tree: tree["files"]["test.beton"].update(sha256="0" * 64), "its manifest says 0000"),
    "digest type": (lambda tree: tree["files"]["test.beton"].update(sha256=None), r"test\.beton is "),
    "file type": (lambda tree: tree["files"].update({"test.beton": []}), r"test\.beton is \[\], expected"),
    "files": (lambda tree: tree.update(files=[]), r"files must be train\.beton and test\.beton"),
    "origin": (lambda tree: tree.update(origin=None), "origin must be text"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_edited_manifest_is_refused(kind: str, copy: Path) -> None:
    edit, message = MANIFESTS[kind]
    edit_manifest(copy, edit)
    refused(copy, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_unreadable_manifest_is_refused(content: bytes, copy: Path) -> None:
    (copy / dataset.MANIFEST).write_bytes(content)
    refused(copy, r"manifest\.json is (damaged|no manifest of this project's)")


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cifar")):
        with pytest.raises(DataError, match=r"data\.dir .* cannot be prepared: (.|\n)*--data\.dir DIR"):
            dataset.ensure(path, "auto", print)
    assert (tmp_path / "file").read_bytes() == b"mine"
    with pytest.raises(DataError, match="does not exist"):
        dataset.ensure(tmp_path / "new", str(tmp_path / "nowhere"), print)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".prepare.lock"]


@pytest.fixture
def read_only(copy: Path) -> Iterator[Path]:
    for options in (["--bind", str(copy), str(copy)], ["-o", "remount,bind,ro", str(copy)]):
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("NOT TESTED: a read-only folder needs the right to mount")
    yield copy
    subprocess.run(["umount", str(copy)], check=True)


def test_read_only_folder(read_only: Path) -> None:
    assert dataset.ensure(read_only, "auto", print).files["test.beton"]["num_samples"] == 10_000
    with pytest.raises(DataError, match="Read-only file system"):
        dataset.ensure(read_only, "auto", print, rebuild=True)


# Preparing, by the command itself


def prepare(folder: Path, source: Path, *more: str) -> subprocess.Popen[str]:
    options = ["--data.dir", str(folder), "--data.source", str(source), *more]
    command = [sys.executable, "-m", "cifar_dist.prepare", *options]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def writers(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ffcv_child" in line and str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for(condition: Callable[[], Any], limit_s: float = 30) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


COMPLETE = [".prepare.lock", "manifest.json", "test.beton", "train.beton"]


def kill_as_soon_as(condition: Callable[[], Any], folder: Path, source: Path) -> None:
    process = prepare(folder, source)
    wait_for(condition)
    process.kill()
    output, _ = process.communicate()
    assert not (folder / dataset.MANIFEST).exists(), output
    wait_for(lambda: not writers(folder))


def test_killed_then_two_at_once(binary_dir: Path, tmp_path: Path) -> None:
    """Killed while reading, and with a part of the training file's 158 MB written, between 1 and 100 of them."""
    folder = tmp_path / "data"
    kill_as_soon_as(lambda: list(folder.glob(".partial-*")), folder, binary_dir)
    enough = random.SystemRandom().randint(1_000_000, 100_000_000)
    print(f"killed as soon as {enough} bytes are written")
    partial = f".partial-*/{dataset.TRAIN}"
    kill_as_soon_as(lambda: sum(path.stat().st_size for path in folder.glob(partial)) >= enough, folder, binary_dir)
    (folder / dataset.TRAIN).write_bytes(b"as if killed between two renames, or somebody's own")

    both = [prepare(folder, binary_dir) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""]
    (first, second) = sorted((out for out, _ in outputs), key=lambda out: "waiting" in out)
    assert first.count(" matches\n") == 6
    assert "prepared from" in first
    assert "train.beton was there without a manifest; moved to" in first
    assert "mean 0.4914 0.4822 0.4465, std 0.2470 0.2435 0.2616" in first
    assert second.count("another process is preparing it; waiting") == 1
    assert "verified 192 MB" in second
    assert "matches" not in second
    (aside,) = folder.glob("set-aside-*")
    assert (aside / dataset.TRAIN).read_bytes().startswith(b"as if killed")
    assert names(folder) == sorted([*COMPLETE, aside.name])
    assert writers(folder) == []
    dataset.ensure(folder, "auto", print)


def test_the_command_refuses_damage(copy: Path, binary_dir: Path) -> None:
    edit_test_file(copy, flip_pixel)
    before = state(copy)
    process = prepare(copy, binary_dir)
    _, error = process.communicate(timeout=60)
    assert process.returncode == DataError.exit_code
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert state(copy) == before


@pytest.mark.slow
def test_damaged_data_is_rebuilt(copy: Path, binary_dir: Path) -> None:
    edit_test_file(copy, flip_pixel)
    process = prepare(copy, binary_dir, "--rebuild", "True")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert names(copy) == COMPLETE
    dataset.ensure(copy, "auto", print)


def test_interrupted_by_the_terminal(binary_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = prepare(folder, binary_dir)
    wait_for(lambda: writers(folder))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert writers(folder) == []
    assert names(folder) == [".prepare.lock"]


def test_full_disk_leaves_nothing(binary_dir: Path, tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a full disk needs the right to mount a tmpfs")
    try:
        with pytest.raises(DataError, match=r"has 104\.9 MB free, the data needs 192\.3 MB"):
            dataset.ensure(tmp_path / "data", str(binary_dir), print)
        assert names(tmp_path / "data") == [".prepare.lock"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_written_file_is_the_official_order(data_dir: Path, binary_dir: Path) -> None:
    images, labels = beton.read_arrays(data_dir / dataset.TEST)
    record = np.frombuffer((binary_dir / "test_batch.bin").read_bytes(), np.uint8).reshape(10_000, 3073)
    np.testing.assert_array_equal(labels, record[:, 0])
    np.testing.assert_array_equal(images[77, :, :, 2].ravel(), record[77, 1 + 2048 :])
