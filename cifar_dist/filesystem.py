"""What file systems may lack, and what takes its place: kernel locks, fsync of folders, renaming onto an open file.

Lustre is often mounted without locks, SMB and FUSE file systems refuse fsync of folders, and some of them refuse to
replace a file that is open. What is missing is said once per process, on rank 0.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.errors import is_main_process

if TYPE_CHECKING:
    import filelock

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOTTY)
_NOT_ONTO_A_FILE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EEXIST, errno.ETXTBSY)
LEASE_S, REFRESH_S = 20.0, 2.0  # ten refreshes; a file server may delay one by some seconds
_said: set[str] = set()


def lock(path: Path, timeout: float = -1) -> filelock.BaseFileLock:
    """A lock, not acquired yet, in the file `path`: one that the kernel releases when its holder dies.

    Where there are none, it is a lease in a file beside it, which its holder refreshes every `REFRESH_S` seconds and
    which ends `LEASE_S` seconds after the last refresh.

    Raises:
        OSError: the file cannot be written.
    """
    import filelock  # here, as most processes need no lock

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another process has it
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _say_once(path.parent, "has no file locks; a file that is refreshed takes their place")
        lease = path.with_name(f"{path.name}.lease")
        return filelock.SoftFileLease(lease, timeout=timeout, lease_duration=LEASE_S, heartbeat_interval=REFRESH_S)
    finally:
        os.close(descriptor)
    return filelock.FileLock(path, timeout)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` survive a power failure, where the file system can do that.

    Raises:
        OSError: the folder cannot be opened, or the disk failed.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EBADF, errno.EACCES, errno.EPERM):
            raise
        _say_once(directory, "cannot sync folders; a power failure may undo what was written last")
    finally:
        os.close(descriptor)


def replace(new: Path, path: Path) -> None:
    """Rename `new` to `path`, in the same folder.

    Where that must not replace a file, the old one is renamed before, and removed after.

    Raises:
        OSError: it failed; `path` is as it was.
    """
    try:
        new.replace(path)
    except OSError as error:
        if error.errno not in _NOT_ONTO_A_FILE or not path.is_file():
            raise
        old = new.with_suffix(".old")
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        with suppress(OSError):  # it may be open
            old.unlink()
        _say_once(path.parent, "cannot replace a file by renaming; it is moved away first")


def _say_once(folder: Path, what: str) -> None:
    if what not in _said and is_main_process():
        print(f"note: the file system of {folder} {what}", file=sys.stderr, flush=True)
    _said.add(what)
