"""The prepared dataset: train.beton, test.beton and manifest.json in one folder, complete or not there.

The manifest is renamed into place last, so it vouches for the two files beside it; `ensure` still hashes them
each time and holds what they contain against CIFAR-10's own digests, not only against the manifest.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from cifar_dist.data import beton, cifar10
from cifar_dist.data.beton_format import Layout
from cifar_dist.data.beton_writer import write_betons
from cifar_dist.errors import DataError
from cifar_dist.files import sync_directory, write_text_atomic

Say = Callable[[str], None]

TRAIN, TEST, MANIFEST = "train.beton", "test.beton", "manifest.json"
COUNTS = {TRAIN: 50_000, TEST: 10_000}
FORMAT = "cifar_dist CIFAR-10, format 1"


@dataclass(frozen=True)
class Manifest:
    """What is in the folder; per file num_samples, size_bytes, sha256. Mean, std: pixels scaled to 0..1."""

    format: str
    files: dict[str, dict[str, Any]]
    arrays_sha256: dict[str, str]
    binary_md5: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    origin: str
    versions: dict[str, str]


def ensure(data_dir: Path, source: str, say: Say, rebuild: bool = False) -> Manifest:
    """Verify the dataset in `data_dir`, preparing it from `source` (see cifar10.fetch) when there is none.

    Of several processes one prepares, the others wait for it. With `rebuild` it is prepared although it is
    there; the old files stay until the new ones are complete. A complete folder is only ever read.

    Raises:
        DataError: the folder cannot be used, its content is damaged or not CIFAR-10, or no source works.
    """
    if not rebuild and os.path.lexists(data_dir / MANIFEST):
        return _verify(data_dir, say)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir, say):
            if not rebuild and os.path.lexists(data_dir / MANIFEST):  # another process was faster
                return _verify(data_dir, say)
            return _prepare(data_dir, source, say)
    except OSError as error:
        reason = "it is a file" if data_dir.is_file() else error.strerror or str(error)
        raise DataError(
            f"data.dir {data_dir} cannot be prepared: {reason} ({error.filename or data_dir}).\n"
            f"Choose a folder that can be written, with some 400 MB free: --data.dir DIR."
        ) from None


# Verifying


def _verify(data_dir: Path, say: Say) -> Manifest:
    started = time.monotonic()
    manifest = _read_manifest(data_dir / MANIFEST)
    facts = {
        name: beton.verify_beton(data_dir / name, COUNTS[name], manifest.files[name]["sha256"])
        for name in (TEST, TRAIN)  # the small one first: damage shows sooner
    }
    _check_content(data_dir, facts)
    size = sum(fact.size_bytes for fact in facts.values())
    say(f"dataset {data_dir}: verified {size / 1e6:.0f} MB in {time.monotonic() - started:.1f} s")
    return manifest


def _check_content(folder: Path, facts: dict[str, beton.BetonFacts]) -> None:
    for name, part in ((TRAIN, "train"), (TEST, "test")):
        for kind, found in (("images", facts[name].images_sha256), ("labels", facts[name].labels_sha256)):
            expected = cifar10.ARRAYS_SHA256[f"{part}_{kind}"]
            if found != expected:
                raise DataError(
                    f"{folder / name}: its {kind} are not those of CIFAR-10's {part} set.\n"
                    f"SHA-256 {found}, expected {expected}.\n"
                    f"Samples per class: {list(facts[name].class_counts)}.\n"
                    f"{beton.advice(folder)}"
                )


def _read_manifest(path: Path) -> Manifest:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}).\n{beton.advice(path.parent)}") from None
    problem = _manifest_problem(tree)
    if problem:
        raise DataError(f"{path} is no manifest of this project's: {problem}.\n{beton.advice(path.parent)}")
    return Manifest(**tree | {"mean": tuple(tree["mean"]), "std": tuple(tree["std"])})


def _manifest_problem(tree: Any) -> str:
    """What is wrong with a parsed manifest, or nothing; all that is known beforehand must be so."""
    if not isinstance(tree, dict) or set(tree) != set(Manifest.__dataclass_fields__):
        return f"it must hold the keys {', '.join(Manifest.__dataclass_fields__)}"
    known = {"format": FORMAT, "arrays_sha256": cifar10.ARRAYS_SHA256, "binary_md5": cifar10.BINARY_MD5,
             "mean": list(cifar10.MEAN), "std": list(cifar10.STD)}  # fmt: skip
    for key, value in known.items():
        if tree[key] != value:
            return f"{key} is {tree[key]!r:.200}, expected {value!r:.200}"
    if not isinstance(tree["origin"], str) or not isinstance(tree["versions"], dict):
        return "origin must be text, versions names and numbers"
    files = tree["files"]
    if not isinstance(files, dict) or set(files) != set(COUNTS):
        return f"files must be {' and '.join(COUNTS)}"
    for name, count in COUNTS.items():
        sha256 = files[name].get("sha256") if isinstance(files[name], dict) else None
        expected = {"num_samples": count, "size_bytes": Layout(count).size_bytes, "sha256": sha256}
        if not isinstance(sha256, str) or files[name] != expected:
            return f"{name} is {files[name]!r:.200}, expected {expected!r}"
    return ""


# Preparing


@contextmanager
def locked(data_dir: Path, say: Say) -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock when its holder dies."""
    lock = filelock.FileLock(data_dir / ".prepare.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"dataset {data_dir}: another process is preparing it; waiting")
            lock.acquire()
    except NotImplementedError:  # older filelock, where the file system knows no flock
        raise DataError(
            f"data.dir {data_dir} is on a file system without locks. Prepare it with one process first:\n"
            f"  python -m cifar_dist.prepare --data.dir SOME_LOCAL_FOLDER, then copy that folder there."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _prepare(data_dir: Path, source: str, say: Say) -> Manifest:
    """Under the lock: write into a folder of its own, verify, then rename; the manifest last."""
    started = time.monotonic()
    for stale in data_dir.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=data_dir))
    try:
        data = cifar10.fetch(source, say, scratch=partial)
        facts = _write(partial, data, say)
        manifest = _manifest(data, facts)
        write_text_atomic(partial / MANIFEST, json.dumps(asdict(manifest), indent=2))
        install(partial, data_dir, say)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"dataset {data_dir}: prepared from {data.origin} in {time.monotonic() - started:.1f} s")
    return manifest


def _write(folder: Path, data: cifar10.Cifar10, say: Say) -> dict[str, beton.BetonFacts]:
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    write_betons({folder / TRAIN: train, folder / TEST: test}, say)
    try:
        facts = {name: beton.verify_beton(folder / name, count) for name, count in COUNTS.items()}
        _check_content(folder, facts)
    except DataError as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"What was just written does not read back; is the disk full or faulty?\n{problem}") from None
    return facts


def _manifest(data: cifar10.Cifar10, facts: dict[str, beton.BetonFacts]) -> Manifest:
    mean, std = cifar10.statistics(data.train_images)
    return Manifest(
        format=FORMAT,
        files={
            name: {"num_samples": fact.num_samples, "size_bytes": fact.size_bytes, "sha256": fact.sha256}
            for name, fact in facts.items()
        },
        arrays_sha256=dict(cifar10.ARRAYS_SHA256),
        binary_md5=dict(cifar10.BINARY_MD5),
        mean=mean,
        std=std,
        origin=data.origin,
        versions={name: version(name) for name in ("ffcv", "numpy")} | {"python": platform.python_version()},
    )


def install(partial: Path, data_dir: Path, say: Say) -> None:
    """Rename into place. Without a manifest nothing here counts as complete, whenever this is interrupted."""
    if os.path.lexists(data_dir / MANIFEST):
        (data_dir / MANIFEST).unlink()  # of a rebuild, before the first file that it does not describe
        sync_directory(data_dir)
    else:
        for name in COUNTS:
            if os.path.lexists(data_dir / name):
                aside = Path(tempfile.mkdtemp(prefix="set-aside-", dir=data_dir)) / name
                (data_dir / name).rename(aside)
                say(f"dataset {data_dir}: {name} was there without a manifest; moved to {aside}")
    for name in (*COUNTS, MANIFEST):
        (partial / name).rename(data_dir / name)
        sync_directory(data_dir)
