"""Make a bundle: a folder with the code, the dataset and wheels, that installs itself and trains without network.

`launch/bundle` calls it. The bundle is written to `.NAME.partial` and renamed when it is complete. SHA256SUMS comes
last; `launch/setup` refuses a bundle without it. Wheels are downloaded to `.NAME.wheels-KEY`, which an interruption
leaves; the next attempt with the same packages for the same machine uses it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import filelock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from cifar_dist import cli, errors
from cifar_dist.errors import UserError
from cifar_dist.files import read_sha256sums, sha256_of_file, sync_directory, write_text_atomic

ROOT = Path(__file__).parents[2]
SUMS, TARGET = "SHA256SUMS", "TARGET"
GENERATED = {".venv", ".uv", "__pycache__"}  # created by launch/setup and Python inside a bundle
PIP = ("pip==26.3", "setuptools==84.2.1", "wheel==0.48.0")
log = partial(print, flush=True)


@dataclass(frozen=True)
class BundleConfig:
    ffcv_wheel: Path
    """FFCV's wheel, from launch/build-ffcv-wheel."""
    out: Path = Path("dist/cifar_dist-bundle")
    """The folder to make; an unchanged older bundle there is replaced."""
    python: str = "3.12"
    """Python of the other machine, major and minor version."""
    system: tuple[str, ...] = ()
    """Packages that the other machine has; they and packages that only they need are left out."""


@dataclass(frozen=True)
class Target:
    """What the other machine must have; the file TARGET, by which launch/setup refuses other machines."""

    python: str
    machine: str
    glibc: str
    system: str
    """Requirements, separated by spaces."""


def main() -> None:
    """Make the bundle and print the command for the other machine."""
    description = "Make a bundle for a machine without network."
    config = cli.parse(BundleConfig, sys.argv[1:], "offline.bundle", description=description)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it makes subprocess.run kill pip
    with errors.exit_on_error():
        make(config)


def make(config: BundleConfig) -> None:
    """Make the bundle in folders beside its place, then rename it."""
    out = config.out.absolute()
    tracked = tracked_files()
    check_replaceable(out)
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    target = read_target(config, next(entry["version"] for entry in lock if entry["name"] == "ffcv"))
    requirements = locked_requirements(target, config.system, {entry["name"] for entry in lock})
    key = hashlib.sha256("\n".join([*requirements, str(target), config.ffcv_wheel.name]).encode()).hexdigest()[:12]
    downloads = out.with_name(f".{out.name}.wheels-{key}")
    begun, aside = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            for left in {begun, aside, *out.parent.glob(f".{out.name}.wheels-*")} - {downloads}:
                shutil.rmtree(left, ignore_errors=True)
            begun.mkdir()
            copy_code_and_data(begun, tracked)
            log(f"bundle: downloading {len(requirements)} packages for Python {target.python} on {target.machine}")
            gather_wheels(downloads, requirements, config.ffcv_wheel, target)
            downloads.rename(begun / "wheels")
            write_sums(begun)
            check_replaceable(out)  # again: the download takes minutes
            if os.path.lexists(out):
                out.rename(aside)
            begun.rename(out)
            sync_directory(out.parent)
            shutil.rmtree(aside, ignore_errors=True)
    except filelock.Timeout:
        raise UserError(f"another process is making {out} now.") from None
    except OSError as error:
        raise UserError(f"the bundle could not be written: {error.strerror} ({error.filename or out}).") from None
    size = sum(path.lstat().st_size for path in files_below(out)) / 1e6
    system = f", and {target.system.replace(' ', ', ')} installed" if target.system else ""
    log(f"bundle: {out} is complete, {size:,.0f} MB")
    log(f"It needs Linux on {target.machine}, Python {target.python}, glibc {target.glibc} or newer{system}.")
    log(f"Copy the folder to such a machine, e.g. by rsync -a {shlex.quote(str(config.out))} MACHINE: and there:")
    log(f"  cd {shlex.quote(out.name)} && ./launch/measure")


def tracked_files() -> list[str]:
    """The files that git tracks and that exist, relative to the repository."""
    listing = ["git", "ls-files", "-z", "--error-unmatch", "cifar_dist/offline/bundle.py", "."]
    text = run(listing, f"{ROOT} is no git checkout; a bundle holds the files that git tracks")
    return [name for name in text.split("\0") if name and os.path.lexists(ROOT / name)]


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but a bundle without changes; wheels and data count as unchanged.

    Raises:
        UserError: names the first file that would be lost.
    """
    if not os.path.lexists(out):
        return
    advice = "Choose another --out, or move it away."
    if not (out / SUMS).is_file() or not (out / "wheels" / TARGET).is_file():
        raise UserError(f"{out} exists and is no bundle. {advice}")
    listed = read_sha256sums(out)
    for path in files_below(out):
        name = str(path.relative_to(out))
        if name == SUMS or (name in listed and name.startswith(("wheels/", "data/"))):
            continue
        if name not in listed or path.is_symlink() or sha256_of_file(path) != listed[name]:
            state = "changed" if name in listed else "added"
            raise UserError(f"{out} is a bundle in which {name} was {state}. {advice}")


# What the bundle is for, and the packages in it


def read_target(config: BundleConfig, ffcv_version: str) -> Target:
    """Processor and glibc are those in the name of FFCV's wheel.

    Raises:
        UserError: the file is no intact wheel of the locked FFCV, or does not support the other machine's Python.
    """
    wheel, python = config.ffcv_wheel, config.python
    advice = "./launch/build-ffcv-wheel makes one."
    if not re.fullmatch(r"3\.\d{1,2}", python):
        raise UserError(f"python is {python}; valid: a version like 3.12.")
    found = re.fullmatch(rf"ffcv-{re.escape(ffcv_version)}-cp3(\d+)-abi3-manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
    if found is None:
        raise UserError(f"{wheel.name} is no wheel of ffcv {ffcv_version} for several Pythons. {advice}")
    if int(python.split(".")[1]) < int(found[1]):
        raise UserError(f"{wheel.name} needs Python 3.{found[1]} or newer, and --python is {python}.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            damage = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        damage = str(error)
    if damage:
        raise UserError(f"{wheel} is damaged ({damage}). {advice}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {canonicalize_name(item.name): str(item) for item in map(Requirement, project["dependencies"])}
    needs = [bounds.get(canonicalize_name(name), name) for name in config.system]
    return Target(python, found[3], f"2.{found[2]}", " ".join(needs))


def locked_requirements(target: Target, system: Sequence[str], locked: Collection[str]) -> list[str]:
    """Lines `name==version --hash=...` of uv.lock for `target`, without FFCV, `system` and what only `system` needs.

    Raises:
        UserError: a name in `system` is not in `locked`, the names in uv.lock.
    """
    names = [canonicalize_name(name) for name in system]
    unknown = set(names) - set(locked)
    if unknown:
        raise UserError(f"--system {' '.join(sorted(unknown))}: uv.lock names no such package.")
    command = ["uv", "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-emit-package", "ffcv"]
    command += ["--no-header", "--no-annotate", *(f"--prune={name}" for name in names)]
    # uv pip compile evaluates the markers, too, but takes the hashes from the package index instead of uv.lock.
    version = {"python_version": target.python, "python_full_version": f"{target.python}.0"}
    environment = {**version, "platform_machine": target.machine}
    lines = []
    for line in run(command, "uv.lock could not be read").replace("\\\n", " ").splitlines():
        package, *hashes = line.split("--hash=")
        requirement = Requirement(package.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            lines.append(" --hash=".join([f"{requirement.name}{requirement.specifier}", *hashes]))
    return lines


def gather_wheels(folder: Path, requirements: Sequence[str], ffcv_wheel: Path, target: Target) -> None:
    """Fill `folder` with the wheels, uv's and FFCV's among them, TARGET and requirements.txt.

    pip checks the hashes, also of files that are there already, and builds what has no wheel.

    Raises:
        UserError: a package could not be downloaded or built.
    """
    folder.mkdir(exist_ok=True)
    version = run(["uv", "--version"], "uv does not run").split()[1]
    command = ["uv", "pip", "compile", "--quiet", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "-"]
    uv = run(command, f"uv {version} was not found", f"uv=={version}")
    wanted = ["--implementation", "cp", "--python-version", target.python]
    wanted += [f"--platform={name}" for name in pip_platforms(target)]
    with tempfile.TemporaryDirectory(prefix="cifar_dist-pip-") as tools:
        install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", tools]
        run([*install, *PIP], "pip could not be installed")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # With a fixed date the same source archive gives the same wheel, byte by byte.
        variables = {"PYTHONPATH": tools, "SOURCE_DATE_EPOCH": "1577836800"}
        download = [*pip, "download", "--no-deps", "--no-build-isolation", "--require-hashes", *wanted]
        complaint = f"the packages for Python {target.python} on {target.machine} could not be downloaded"
        download += ["--dest", str(folder), "--requirement", "/dev/stdin"]
        run(download, complaint, "\n".join([*requirements, uv]), variables)
        for archive in folder.glob("*.tar.gz"):
            build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(archive)]
            run(build, f"{archive.name} could not be built", environment=variables)
            archive.unlink()
    shutil.copy(ffcv_wheel, folder)
    lines = []
    for path in sorted(folder.glob("*.whl")):
        name, number, _, tags = parse_wheel_filename(path.name)
        if any(tag.platform.startswith("linux") for tag in tags):
            raise UserError(f"{path.name} was compiled for this machine and would not run on another.")
        if name != "uv":  # launch/setup unpacks it
            lines.append(f"{name}=={number} --hash=sha256:{sha256_of_file(path)}\n")
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    facts = "".join(f"{key} {value}\n" for key, value in asdict(target).items() if value)
    (folder / TARGET).write_text(facts, encoding="utf-8")


def pip_platforms(target: Target) -> list[str]:
    """Names of all platforms whose wheels run on `target`, best first: pip takes each name literally."""
    names = [f"manylinux_2_{minor}" for minor in range(int(target.glibc.removeprefix("2.")), 4, -1)]
    names += ["manylinux2014", "manylinux2010", "manylinux1"]  # older names of 2.17, 2.12 and 2.5
    return [f"{name}_{target.machine}" for name in names]


def run(command: Sequence[str], complaint: str, stdin: str = "", environment: Mapping[str, str] | None = None) -> str:
    """The output of a command in the repository; if it fails, `complaint` and the end of its output are the error."""
    env = os.environ | (environment or {})
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    except OSError as error:
        raise UserError(f"{complaint}: {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise UserError(f"{complaint}:\n{tail}")
    return done.stdout


# Files of the bundle


def copy_code_and_data(begun: Path, tracked: Sequence[str]) -> None:
    # Here, so that mistakes on the command line are refused before torch is loaded.
    from cifar_dist.data.cifar10 import BETON_FILES
    from cifar_dist.data.prepare import install
    from cifar_dist.training.summary import git_commit

    for name in tracked:
        (begun / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, begun / name, follow_symlinks=False)
    (begun / "COMMIT").write_text(f"{git_commit() or 'unknown'}\n", encoding="utf-8")
    install.ensure(ROOT / "data", "auto", log)
    (begun / "data").mkdir()
    for name in BETON_FILES:
        shutil.copyfile(ROOT / "data" / name, begun / "data" / name)
    install.verify(begun / "data", log)


def write_sums(begun: Path) -> None:
    """Write wheels/SHA256SUMS and SHA256SUMS, after every other file has reached the disk."""
    for folder in (begun / "wheels", begun):
        lines = []
        for path in files_below(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            lines.append(f"{sha256_of_file(path)}  {path.relative_to(folder)}\n")
        write_text_atomic(folder / SUMS, "".join(lines))


def files_below(folder: Path) -> Iterator[Path]:
    """All files below, sorted, except generated ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - GENERATED)
        yield from (Path(place, name) for name in sorted(names))


if __name__ == "__main__":
    main()
