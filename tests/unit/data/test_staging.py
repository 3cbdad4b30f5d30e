"""The copy of the dataset on a node's own disk: complete and verified, or not used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.data import cifar10
from cifar_dist.data.cifar10 import BETON_FILES
from cifar_dist.data.prepare.install import stage

pytestmark = pytest.mark.data


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".prepare.lock"}


COMPLETE = set(BETON_FILES)


def test_copied_once_then_used_without_the_source(data_dir: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tmp_path / "on this machine"
    assert stage(data_dir, folder, "auto", lines.append) == folder
    assert names(folder) == COMPLETE
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any("copied to" in line for line in lines)
    inode = (folder / cifar10.TRAIN).stat().st_ino
    assert stage(tmp_path / "gone", folder, "none", lines.append) == folder
    assert (folder / cifar10.TRAIN).stat().st_ino == inode


def test_damaged_copy_is_made_anew(data_dir: Path, tmp_path: Path) -> None:
    stage(data_dir, tmp_path / "stage", "auto", print)
    path = tmp_path / "stage" / cifar10.TEST
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    (tmp_path / "stage/.partial-left").mkdir()  # by a process that was killed
    lines: list[str] = []
    assert stage(data_dir, tmp_path / "stage", "auto", lines.append) == tmp_path / "stage"
    assert any("is damaged and is replaced" in line for line in lines)
    assert path.read_bytes() == (data_dir / cifar10.TEST).read_bytes()
    assert names(tmp_path / "stage") == COMPLETE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_room(small_disk: Path, data_dir: Path) -> None:
    lines: list[str] = []
    assert stage(data_dir, small_disk / "stage", "auto", lines.append) == data_dir
    assert any("no room for 192 MB" in line for line in lines)
    assert names(small_disk / "stage") == set()


def test_folder_that_others_may_write_to_is_not_used(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    lines: list[str] = []
    assert stage(data_dir, folder, "auto", lines.append) == data_dir
    assert any("others may write there" in line for line in lines)
    assert names(folder) == set()


def test_several_processes_copy_once(data_dir: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from cifar_dist.data.prepare.install import stage
source, copy = map(Path, sys.argv[1:])
assert stage(source, copy, "auto", print) == copy
"""
    command = [sys.executable, "-c", code, str(data_dir), str(tmp_path / "stage")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("copied to" in output for output in outputs) == 1
