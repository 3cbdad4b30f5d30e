"""Atomic files, on a real file system."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.files import read_json, write_bytes_atomic, write_json, write_text_atomic
from cifar_dist.training import checkpoint

# A limit on the size of files makes the kernel refuse a write half-way, as a full disk does.
FULL_DISK = """
import resource, sys
from pathlib import Path
from cifar_dist.files import write_bytes_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes_atomic(Path(sys.argv[1]), b"x" * 5000)
except OSError as error:
    print(error.strerror)
"""


def test_replaces_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    write_bytes_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_read_back_and_damage_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    write_json(path, {"a": [1, None], "b": "zwölf"})
    assert read_json(path) == {"a": [1, None], "b": "zwölf"}
    for damaged in (b"", b'{"a": 1', b"[1]", b"\xff"):
        path.write_bytes(damaged)
        assert read_json(path) == {}


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a.txt", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "File too large\n"
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text_atomic(tmp_path / "taken", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomic(tmp_path / "missing" / "a.txt", "text")


# Something that is done to a file: what, its name without the random part of a temporary one, its size, the new name.
Done = tuple[str, str, int, str]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Done]:
    """All syncs and renames from now on, in their order."""
    seen: list[Done] = []
    fsync, replace = os.fsync, Path.replace

    def plain(path: Path) -> str:
        parts = path.name.split(".")
        return ".".join([*parts[:-2], "*", "tmp"]) if parts[-1] == "tmp" else path.name

    def recording_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append(("fsync", plain(path), 0 if path.is_dir() else path.stat().st_size, ""))
        fsync(descriptor)

    def recording_replace(path: Path, target: Path) -> Path:
        seen.append(("rename", plain(path), path.stat().st_size, target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    return seen


def written_safely(name: str, size: int, folder: Path) -> list[Done]:
    """The order in which a power failure at any moment leaves the old file or the whole new one."""
    temporary = f".{name}.*.tmp"
    return [("fsync", temporary, size, ""), ("rename", temporary, size, name), ("fsync", folder.name, 0, "")]


def test_all_bytes_are_on_the_disk_before_the_rename_and_the_rename_at_the_end(
    tmp_path: Path, done: list[Done]
) -> None:
    write_bytes_atomic(tmp_path / "a.bin", b"x" * 1000)
    assert done == written_safely("a.bin", 1000, tmp_path)
    done.clear()
    write_text_atomic(tmp_path / "a.bin", "new")
    assert done == written_safely("a.bin", 3, tmp_path)


def test_a_checkpoint_has_its_digest_first(tmp_path: Path, done: list[Done]) -> None:
    """A checkpoint without a digest would be skipped; a digest without a checkpoint is nothing."""
    folder = tmp_path / "checkpoints"
    checkpoint.write(folder, 20, b"x" * 1000)
    digest = (folder / "step-00000020.pt.sha256").read_bytes()
    assert digest.split() == [hashlib.sha256(b"x" * 1000).hexdigest().encode(), b"step-00000020.pt"]
    assert done == [
        *written_safely("step-00000020.pt.sha256", len(digest), folder),
        *written_safely("step-00000020.pt", 1000, folder),
    ]
