"""Files that are complete or absent: written beside, synced, renamed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, as `write_bytes_atomic` does.

    Raises:
        OSError: as from `write_bytes_atomic`.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; a reader sees the old file or the new one, also after a power failure.

    The folder must exist. The new file gets the permissions that the umask gives any new file.

    Raises:
        OSError: the write failed (disk full, no permission); the old file is untouched and nothing is left
            behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # also an interrupt must leave no temporary file
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals inside `directory` survive a power failure.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
