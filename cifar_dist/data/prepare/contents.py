"""All files below a folder or in an archive, also in archives in it, with bounds on what is read.

Nothing is written to the disk: archives are read as streams, and their names only tell labels.
"""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from cifar_dist.errors import one_line

MAX_FILES, MAX_FILES_AUTO = 400_000, 100_000  # Kaggle's copy has 350,000; auto: where the user named no path
MAX_FILE_BYTES = 256 << 20  # of one file that is read into memory; all images have 184 MB
MAX_UNPACKED_BYTES = 8 << 30  # of all archives together
_MAX_DIRECTORY_BYTES = 64 << 20  # of a zip archive; Python needs ten times as much memory
_MAX_DEPTH = 4  # of archives in archives; each compression counts, too
_HEAD_BYTES = 512
_DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ARCHIVES = (".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".txz", ".xz", ".zip", ".npz")
UNREADABLE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError,  # encrypted
    ValueError, OverflowError, struct.error, TypeError, LookupError,  # of damaged content
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A file that is no archive."""

    path: Path
    """The file on the disk: this one, or the archive that it is in."""
    name: PurePosixPath
    """Its path below the folder or in the archive."""
    head: bytes
    """Its first bytes, 512 at most."""
    size: int
    rest: IO[bytes]

    def read(self) -> bytes:
        """The whole content; to be called once, with a size of at most MAX_FILE_BYTES."""
        return self.head + self.rest.read(self.size - len(self.head))


class _ExhaustedError(Exception):
    pass


class Walk:
    """Calls `visit` with each file below a path until it returns True.

    Args:
        visit: may raise what reading raises (UNREADABLE); then the next file follows.
        note: gets a sentence for each file that cannot be read, and for a bound that ended the walk.
        first: files of these names come first, then those in the fewest folders.
        max_files: number of files in folders, and again of those in archives, that are looked at.
    """

    def __init__(
        self, visit: Callable[[Item], bool], note: Callable[[str], None], first: Container[str] = (),
        max_files: int = MAX_FILES,
    ) -> None:  # fmt: skip
        self.visit, self.note, self.first, self.max_files = visit, note, first, max_files
        self._members, self._unpacked = 0, 0

    def below(self, root: Path) -> None:
        """Visit the file `root`, or the files below the folder `root`."""
        path = root
        try:
            for path in self._paths(root):
                name = PurePosixPath(path.relative_to(root) if path != root else path.name)
                if self._try(path, name, partial(_open_file, path), None, 0):
                    return
        except _ExhaustedError as error:
            self.note(f"The search ended in {path} after {error}: name the path of the copy itself.")

    def _paths(self, root: Path) -> list[Path]:
        if root.is_file():
            return [root]
        found: list[str] = []
        folders, seen = deque([str(root)]), set[tuple[int, int]]()
        while folders:
            folder = folders.popleft()
            try:
                status = Path(folder).stat()
                if (key := (status.st_dev, status.st_ino)) in seen:  # by a symbolic link
                    continue
                seen.add(key)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with suppress(OSError):  # a symbolic link to itself
                            if entry.is_dir():
                                folders.append(entry.path)
                            elif entry.is_file():
                                found.append(entry.path)
                        if len(found) + len(folders) + len(seen) > self.max_files:
                            self.note(f"Only {len(found):,} files were looked at: name the path of the copy itself.")
                            folders.clear()
                            break
            except OSError as error:
                if folder == str(root):
                    self.note(f"it cannot be read ({one_line(error)}).")
        found.sort(key=lambda path: (path.rpartition("/")[2] not in self.first, path.count("/"), path))
        return [Path(path) for path in found]

    def _try(
        self, path: Path, name: PurePosixPath, opener: Callable[[], IO[bytes]], size: int | None, depth: int
    ) -> bool:
        """`_open` what `opener` opens; a file that cannot be read is noted."""
        try:
            with opener() as stream:
                size = os.fstat(stream.fileno()).st_size if depth == 0 else size
                return self._open(path, name, stream, size, depth)
        except UNREADABLE as error:
            self.note(f"{name} cannot be read, is too large, damaged or cut short ({one_line(error)}).")
        return False

    def _open(self, path: Path, name: PurePosixPath, stream: IO[bytes], size: int | None, depth: int) -> bool:
        """Visit a file, or what is in it; whether `visit` returned True. `size` is None if not known yet."""
        if size == 0 and name.suffix.lower() not in _ARCHIVES:
            return False
        head = stream.read(_HEAD_BYTES)
        opener = next((opener for magic, opener in _DECOMPRESSORS.items() if head.startswith(magic)), None)
        is_tar, is_zip = opener is None and _is_tar(head), head.startswith(b"PK\x03\x04")
        if opener or is_tar or is_zip:
            if depth == _MAX_DEPTH:
                raise OSError(f"more than {_MAX_DEPTH} archives in each other")
            stream.seek(0)
        if opener:
            inner = PurePosixPath(name.with_suffix("") if name.suffix in _ARCHIVES else name)
            return self._open(path, inner, self._limited(opener(stream)), None, depth + 1)
        if is_tar:
            return self._open_tar(path, name, stream, depth)
        if is_zip:
            return self._open_zip(path, name, stream, depth)
        if name.suffix.lower() in _ARCHIVES:
            raise OSError("it is no archive")
        if size is None:
            rest = stream.read(MAX_FILE_BYTES)
            return self.visit(Item(path, name, head, len(head + rest), io.BytesIO(rest)))
        return self.visit(Item(path, name, head, size, stream))

    def _open_tar(self, path: Path, name: PurePosixPath, stream: IO[bytes], depth: int) -> bool:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"].clear()  # else tarfile keeps them all
                self._count_member()
                inner = name / member.name.lstrip("/")
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None and self._try(path, inner, content.__enter__, member.size, depth + 1):
                    return True
        return False

    def _open_zip(self, path: Path, name: PurePosixPath, stream: IO[bytes], depth: int) -> bool:
        if depth:  # a zip archive is read from its end
            stream = io.BytesIO(stream.read(MAX_FILE_BYTES))
        stream.seek(max(stream.seek(0, os.SEEK_END) - (1 << 16) - 22, 0))
        end = stream.read()
        at = end.rfind(b"PK\x05\x06")
        if int.from_bytes(end[at + 12 : at + 16], "little") > _MAX_DIRECTORY_BYTES:
            raise OSError("it holds too many files")
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                self._count_member()
                inner = name / info.filename.lstrip("/")
                opener = partial(self._member, archive, info)
                if not info.is_dir() and self._try(path, inner, opener, info.file_size, depth + 1):
                    return True
        return False

    def _member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
        return self._limited(archive.open(info))

    def _count_member(self) -> None:
        self._members += 1
        if self._members > self.max_files:
            raise _ExhaustedError(f"{self.max_files:,} files in archives")

    def _limited(self, stream: IO[bytes]) -> IO[bytes]:
        return cast(IO[bytes], _Limited(stream, self._count_bytes))

    def _count_bytes(self, number: int) -> None:
        self._unpacked += number
        if self._unpacked > MAX_UNPACKED_BYTES:
            raise _ExhaustedError(f"{MAX_UNPACKED_BYTES >> 30} GiB of unpacked content")


class _Limited:
    """What tarfile, zipfile and the decompressors use of a stream; a few bytes may stand for terabytes."""

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self.stream, self.count = stream, count

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES:
            raise OSError(f"a part of it is larger than {MAX_FILE_BYTES >> 20} MiB")
        content = self.stream.read(size)
        self.count(len(content))
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == os.SEEK_SET:
            self.count(max(position - self.stream.tell(), 0))
        return self.stream.seek(position, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def seekable(self) -> bool:
        return True

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _is_tar(head: bytes) -> bool:
    if not head[148:156].strip(b" \0").isdigit():  # the checksum; most files end here
        return False
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True
