"""A folder that sets itself up and measures on a machine without network; launch/bundle is how it is started.

It is written beside its place and renamed when it is complete: SHA256SUMS comes last, and launch/setup refuses a
folder without it. Stopped in the middle, the wheels that are there are kept for the next attempt.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cifar_dist import bundled, cli, errors, wheels
from cifar_dist.bundled import COMMIT, SUMS, sha256
from cifar_dist.errors import UserError
from cifar_dist.files import sync_directory, write_text_atomic

ROOT = Path(__file__).parents[1]
# What launch/setup and Python make in a bundle at work, and make again.
REMADE = {".venv", ".uv", "__pycache__"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class BundleConfig:
    ffcv_wheel: Path
    """FFCV's wheel, from launch/build-ffcv-wheel."""
    out: Path = Path("dist/cifar_dist-bundle")
    """The folder to make; an older bundle there is replaced when the new one is complete."""
    python: str = "3.12"
    """The other machine's Python, major and minor version."""
    system: tuple[str, ...] = ()
    """Packages that the other machine brings itself; they and what only they need are left out."""


def main() -> None:
    """Make the bundle and say what to type on the other machine."""
    config = cli.parse(BundleConfig, sys.argv[1:], "bundle", description="Make a folder for a machine without network.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception ends pip, too
    with errors.reported():
        make(config, partial(print, flush=True))


def make(config: BundleConfig, say: Say) -> None:
    """Make, check and place the bundle.

    Raises:
        UserError: an argument is wrong, this is no git checkout, or something could not be fetched or written.
    """
    if not re.fullmatch(r"3\.\d{1,2}", config.python):
        raise UserError(f"python is {config.python}; valid: a version like 3.12.")
    out = config.out.absolute()
    tracked = _tracked()
    check_replaceable(out)
    target = wheels.target_of(config.ffcv_wheel, config.python)
    locked = wheels.pins(ROOT, target, [canonicalize_name(name) for name in config.system])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            begun = out.with_name(f".{out.name}.partial")
            sums = _fill(begun, tracked, config, target, locked, say)
            _seal(begun, sums)
            check_replaceable(out)
            _place(begun, out)
    except filelock.Timeout:
        raise UserError(f"another process is making {out} at this moment.") from None
    except OSError as error:
        raise UserError(f"the bundle could not be written: {error.strerror} ({error.filename or out}).") from None
    _report(out, config, target, say)


def _tracked() -> list[Path]:
    """The files that git tracks, as far as they are there, relative to the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise UserError("git is missing; a bundle holds the files that git tracks.") from None
    names = [Path(name) for name in listing.stdout.split("\0") if name]
    if listing.returncode != 0 or Path("cifar_dist/bundle.py") not in names:
        raise UserError(f"{ROOT} is no git checkout; a bundle holds the files that git tracks. Make it in a clone.")
    return [name for name in names if os.path.lexists(ROOT / name)]


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an older bundle, or one in which somebody left work of theirs."""
    if not os.path.lexists(out):
        return
    advice = "Choose another --out, or move it away."
    if not (out / SUMS).is_file() or not (out / "wheels" / wheels.TARGET).is_file():
        raise UserError(f"{out} is there, and is no bundle. {advice}")
    listed = bundled.read_sums(out)
    for path in _files(out):
        name = str(path.relative_to(out))
        if name == SUMS or (name in listed and Path(name).parts[0] in ("wheels", "data")):
            continue
        if name not in listed or path.is_symlink() or sha256(path) != listed[name]:
            state = "changed" if name in listed else "added"
            raise UserError(f"{out} is a bundle in which {name} was {state} later. {advice}")


def _files(folder: Path) -> Iterator[Path]:
    """All files below, sorted, without those that are made again."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - REMADE)
        yield from (Path(place, name) for name in sorted(names))


def _fill(
    begun: Path,
    tracked: Sequence[Path],
    config: BundleConfig,
    target: wheels.Target,
    locked: Sequence[wheels.Pin],
    say: Say,
) -> dict[str, str]:
    """Everything but SHA256SUMS, into `begun`; returns the digests that are known already."""
    _clear(begun, target)
    say(f"bundle: getting {len(locked)} packages as wheels for Python {target.python} on {target.machine}")
    sums = _fill_wheels(begun / "wheels", config, target, locked)
    sums |= _fill_data(begun / "data", say)
    say(f"bundle: copying {len(tracked)} files that git tracks")
    for name in tracked:
        (begun / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, begun / name, follow_symlinks=False)
    from cifar_dist.training import summary

    (begun / COMMIT).write_text(f"{summary.git_commit() or 'unknown'}\n", encoding="utf-8")
    return sums


def _clear(begun: Path, target: wheels.Target) -> None:
    """Keep nothing of an earlier attempt but wheels for the same machine."""
    begun.mkdir(exist_ok=True)
    folder = begun / "wheels"
    for path in begun.iterdir():
        if path != folder:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    marker = folder / wheels.TARGET
    if folder.exists() and not (marker.is_file() and marker.read_text(encoding="utf-8").startswith(target.text())):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)
    marker.write_text(target.text(), encoding="utf-8")


def _fill_wheels(
    folder: Path, config: BundleConfig, target: wheels.Target, locked: Sequence[wheels.Pin]
) -> dict[str, str]:
    sums = wheels.gather(folder, locked, target, config.ffcv_wheel)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {canonicalize_name(item.name): item for item in map(Requirement, project["dependencies"])}
    needs = [str(asked.get(canonicalize_name(name), name)) for name in config.system]
    text = f"{target.text()}glibc 2.{wheels.needed_glibc(sums)}\nsystem {' '.join(needs)}".rstrip()
    (folder / wheels.TARGET).write_text(f"{text}\n", encoding="utf-8")
    return {f"wheels/{name}": digest for name, digest in sums.items()}


def _fill_data(folder: Path, say: Say) -> dict[str, str]:
    from cifar_dist.data import dataset

    manifest = dataset.ensure(ROOT / "data", "auto", say)
    folder.mkdir()
    for name in (*manifest.files, dataset.MANIFEST):
        shutil.copyfile(ROOT / "data" / name, folder / name)
    sums = {f"data/{name}": sha256(folder / name) for name in manifest.files}
    for name, entry in manifest.files.items():
        if sums[f"data/{name}"] != entry["sha256"]:
            raise UserError(f"{name} was damaged while it was copied into {folder}. Is the disk faulty?")
    return sums


def _seal(begun: Path, known: dict[str, str]) -> None:
    """Digests of the wheels for themselves, then of everything; then all of it to the disk."""
    names = [str(path.relative_to(begun)) for path in _files(begun)]
    sums = {name: known.get(name) or sha256(begun / name) for name in names}
    inner = {name.removeprefix("wheels/"): digest for name, digest in sums.items() if name.startswith("wheels/")}
    write_text_atomic(begun / "wheels" / SUMS, _lines(inner))
    sums[f"wheels/{SUMS}"] = sha256(begun / "wheels" / SUMS)
    for name in sums:
        with (begun / name).open("rb") as file:
            os.fsync(file.fileno())
    write_text_atomic(begun / SUMS, _lines(sums))


def _lines(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _place(begun: Path, out: Path) -> None:
    """Rename into place; an older bundle steps aside first and is removed last."""
    aside = out.with_name(f".{out.name}.old")
    if aside.exists():
        shutil.rmtree(aside)
    if os.path.lexists(out):
        out.rename(aside)
    begun.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _report(out: Path, config: BundleConfig, target: wheels.Target, say: Say) -> None:
    sizes = {path: path.stat().st_size for path in _files(out)}

    def megabytes(folder: Path) -> str:
        return f"{sum(size for path, size in sizes.items() if path.is_relative_to(folder)) / 1e6:,.0f} MB"

    lines = (out / "wheels" / wheels.TARGET).read_text(encoding="utf-8").splitlines()
    facts = {name: value for name, _, value in (line.partition(" ") for line in lines)}
    own = f", and with {facts['system'].replace(' ', ', ')} of its own" if facts.get("system") else ""
    parts = f"wheels {megabytes(out / 'wheels')}, data {megabytes(out / 'data')}"
    say(f"bundle: {out} is complete, {megabytes(out)} ({parts})")
    say(f"It is for Linux on {target.machine} with Python {target.python}, glibc {facts['glibc']} or newer{own}.")
    say(f"Copy the folder to such a machine, e.g. by rsync -a {config.out} MACHINE: and there:")
    say(f"  cd {out.name} && ./launch/measure")


if __name__ == "__main__":
    main()
