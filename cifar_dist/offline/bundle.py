"""Make a bundle: a folder with the code, the dataset and wheels, that installs itself and trains without network.

`launch/bundle` calls it. The bundle is written to `.NAME.partial` and renamed when it is complete. SHA256SUMS comes
last; `launch/setup` refuses a bundle without it. Wheels are downloaded to `.NAME.wheels-KEY`, which an interruption
leaves; the next attempt with the same packages for the same machine uses it.
"""

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import filelock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from cifar_dist import cli, errors
from cifar_dist.data.cifar10 import BETON_FILES, FFCV_VERSION
from cifar_dist.data.prepare import install
from cifar_dist.errors import UserError
from cifar_dist.files import sha256_of_file, write_text_atomic
from cifar_dist.filesystem import lock, sync_directory
from cifar_dist.process import run_and_exit

ROOT = Path(__file__).parents[2]
SUMS, TARGET = "SHA256SUMS", "TARGET"
log = partial(print, flush=True)


@dataclass(frozen=True)
class BundleConfig:
    ffcv_wheel: Path
    """FFCV's wheel, from launch/build-ffcv-wheel."""
    out: Path = Path("dist/cifar_dist-bundle")
    """The folder to make."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it makes subprocess.run kill pip
    with errors.exit_on_error():
        make(cli.parse(BundleConfig, sys.argv[1:], "offline.bundle", description=description))


def make(config: BundleConfig) -> None:
    """Make the bundle in folders beside its place, then rename it."""
    tracked = tracked_files()
    out = config.out.absolute()
    target = read_target(config.ffcv_wheel, config.python, config.system)
    requirements = locked_requirements(target, config.system)
    key = hashlib.sha256("\n".join([*requirements, str(target), config.ffcv_wheel.name]).encode()).hexdigest()[:12]
    downloads = out.with_name(f".{out.name}.wheels-{key}")
    with complete_or_absent(out) as begun:
        for left in set(out.parent.glob(f".{out.name}.wheels-*")) - {downloads}:
            shutil.rmtree(left, ignore_errors=True)
        copy_code_and_data(begun, tracked)
        log(f"bundle: downloading {len(requirements)} packages for Python {target.python} on {target.machine}")
        gather_wheels(downloads, [*requirements, uv_requirement()], config.ffcv_wheel, target)
        downloads.rename(begun / "wheels")
        write_sums(begun / "wheels")
        write_sums(begun)
    size = sum(path.lstat().st_size for path in out.rglob("*")) / 1e6
    system = f", and {target.system.replace(' ', ', ')} installed" if target.system else ""
    log(
        f"bundle: {out} is complete, {size:,.0f} MB\n"
        f"It needs Linux on {target.machine}, Python {target.python}, glibc {target.glibc} or newer{system}.\n"
        f"Copy the folder to such a machine, e.g. by rsync -a {shlex.quote(str(config.out))} MACHINE: and there:\n"
        f"  cd {shlex.quote(out.name)} && ./launch/measure"
    )


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `out` at the end. An interruption leaves it to the next attempt.

    Raises:
        UserError: `out` exists, cannot be written, or another process is making it.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already. Remove it, or choose another --out.")
    begun = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(out.with_name(f".{out.name}.lock"), timeout=0):
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
            yield begun
            begun.rename(out)
            sync_directory(out.parent)
    except filelock.Timeout:
        raise UserError(f"another process is making {out} now.") from None
    except OSError as error:
        raise UserError(f"the bundle could not be written: {error.strerror} ({error.filename or out}).") from None


def tracked_files() -> list[str]:
    """The files that git tracks and that exist, relative to the repository."""
    listing = ["git", "ls-files", "-z", "--error-unmatch", "cifar_dist/offline/bundle.py", "."]
    text = run(listing, f"{ROOT} is no git checkout; a bundle holds the files that git tracks")
    return [name for name in text.split("\0") if name and os.path.lexists(ROOT / name)]


# What the bundle is for, and the packages in it


def read_target(wheel: Path, python: str, system: Sequence[str] = ()) -> Target:
    """Processor and glibc are those in the name of FFCV's wheel.

    Raises:
        UserError: the file is no intact wheel of the right FFCV, or does not support the other machine's Python.
    """
    advice = "./launch/build-ffcv-wheel makes one."
    if not re.fullmatch(r"3\.\d{1,2}", python):
        raise UserError(f"python is {python}; valid: a version like 3.12.")
    found = re.fullmatch(rf"ffcv-{re.escape(FFCV_VERSION)}-cp3(\d+)-abi3-manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
    if found is None:
        raise UserError(f"{wheel.name} is no wheel of ffcv {FFCV_VERSION} for several Pythons. {advice}")
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
    needs = [bounds.get(canonicalize_name(name), name) for name in system]
    return Target(python, found[3], f"2.{found[2]}", " ".join(needs))


def locked_requirements(target: Target, system: Sequence[str]) -> list[str]:
    """Lines `name==version --hash=...` of uv.lock for `target`, without FFCV, `system` and what only `system` needs.

    Raises:
        UserError: a name in `system` is not in uv.lock.
    """
    names = [canonicalize_name(name) for name in system]
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")
    if unknown := [name for name in names if f'\nname = "{name}"\n' not in lock]:
        raise UserError(f"--system {' '.join(unknown)}: uv.lock names no such package.")
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


def uv_requirement() -> str:
    """The line for the uv at work, which launch/setup uses on the other machine."""
    version = run(["uv", "--version"], "uv does not run").split()[1]
    command = ["uv", "pip", "compile", "--quiet", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "-"]
    return run(command, f"uv {version} was not found", f"uv=={version}")


def gather_wheels(folder: Path, requirements: Sequence[str], ffcv_wheel: Path, target: Target) -> None:
    """Fill `folder` with the wheels, FFCV's among them, TARGET and requirements.txt.

    pip checks the hashes, also of files that are there already, and builds what has no wheel.

    Raises:
        UserError: a package could not be downloaded or built.
    """
    folder.mkdir(exist_ok=True)
    pip = ["uv", "tool", "run", "--quiet", "--python", sys.executable, "--with=setuptools==84.2.1"]
    pip += ["--with=wheel==0.48.0", "pip@26.3", "--quiet", "--disable-pip-version-check"]
    download = [*pip, "download", "--no-deps", "--no-build-isolation", "--require-hashes", "--implementation=cp"]
    download += [f"--python-version={target.python}", f"--dest={folder}", "--requirement=/dev/stdin"]
    # All whose wheels run there, best first. pip knows only that manylinux2014 includes the two older names.
    platforms = [f"manylinux_2_{minor}" for minor in range(int(target.glibc.removeprefix("2.")), 4, -1)]
    download += [f"--platform={name}_{target.machine}" for name in (*platforms, "manylinux2014")]
    complaint = f"the packages for Python {target.python} on {target.machine} could not be downloaded"
    run(download, complaint, "\n".join(requirements))
    for archive in folder.glob("*.tar.gz"):
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(archive)]
        run(build, f"{archive.name} could not be built")
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


def run(command: Sequence[str], complaint: str, stdin: str = "") -> str:
    """The output of a command in the repository; if it fails, `complaint` and the end of its output are the error."""
    # With a fixed date the same source archive gives the same wheel, byte by byte.
    env = os.environ | {"SOURCE_DATE_EPOCH": "1577836800"}
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
    from cifar_dist.training.summary import git_commit  # here, as it takes a second

    for name in tracked:
        (begun / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, begun / name, follow_symlinks=False)
    (begun / "COMMIT").write_text(f"{git_commit() or 'unknown'}\n", encoding="utf-8")
    install.ensure(ROOT / "data", "auto", log)
    (begun / "data").mkdir()
    for name in BETON_FILES:
        shutil.copyfile(ROOT / "data" / name, begun / "data" / name)
    install.verify(begun / "data", log)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, after every other file has reached the disk."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        lines.append(f"{sha256_of_file(path)}  {path.relative_to(folder)}\n")
    write_text_atomic(folder / SUMS, "".join(lines))


if __name__ == "__main__":
    run_and_exit(main)
