"""For bundle.py: a folder of wheels that installs what uv.lock names on another machine, without network.

Versions and SHA-256 come from uv.lock. pip downloads, because uv keeps no wheels, and knows by itself which of a
project's wheels fit another Python; what exists as source only is built here, and must come out as pure Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

from cifar_dist.bundled import sha256
from cifar_dist.errors import UserError

REQUIREMENTS, TARGET = "requirements.txt", "TARGET"
TOOLS = ("pip==26.3", "setuptools==84.2.1", "wheel==0.48.0")
# glibc's minor version by the older names of platforms.
OLD_PLATFORMS = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for; `glibc` is the minor version of glibc 2."""

    python: str
    machine: str
    glibc: int

    def text(self) -> str:
        """The beginning of the file TARGET, by which launch/setup knows whether the wheels are for its machine."""
        return f"python {self.python}\nmachine {self.machine}\n"

    def environment(self) -> dict[str, str]:
        """What markers like `python_full_version >= '3.12'` are held against."""
        here = {name: str(value) for name, value in default_environment().items()}
        version = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        return here | version | {"platform_machine": self.machine, "implementation_version": f"{self.python}.0"}

    def platforms(self) -> list[str]:
        """Names of platforms for pip, the best first; it compares them letter by letter."""
        old = {minor: name for name, minor in OLD_PLATFORMS.items()}
        names = [
            name
            for minor in range(self.glibc, 4, -1)
            for name in (f"manylinux_2_{minor}", *([old[minor]] if minor in old else []))
        ]
        return [f"{name}_{self.machine}" for name in names]


@dataclass(frozen=True)
class Pin:
    """One package as uv.lock names it; `hashes` are the SHA-256 of all its files."""

    name: str
    version: str
    hashes: tuple[str, ...]
    source_only: bool

    def line(self, hashes: Iterable[str]) -> str:
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{value}" for value in hashes)])


def target_of(ffcv_wheel: Path, python: str) -> Target:
    """The machine that FFCV's wheel is for, with the Python `python`, like 3.12.

    Raises:
        UserError: the file is no whole wheel of the locked FFCV, or does not serve that Python.
    """
    name = ffcv_wheel.name
    found = re.fullmatch(r"ffcv-([\d.]+)-cp3(\d+)-abi3-manylinux_2_(\d+)_(\w+)\.whl", name)
    advice = "./launch/build-ffcv-wheel makes one."
    if found is None:
        raise UserError(f"{name} is no wheel of FFCV that serves several Pythons. {advice}")
    if int(python.split(".")[1]) < int(found[2]):
        raise UserError(f"{name} serves no Python before 3.{found[2]}, and --python is {python}.")
    try:
        with zipfile.ZipFile(ffcv_wheel) as archive:
            archive.getinfo(f"ffcv-{found[1]}.dist-info/METADATA")
            damaged = archive.testzip()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{ffcv_wheel} cannot be read as a wheel of FFCV: {error}. {advice}") from None
    if damaged is not None:
        raise UserError(f"{ffcv_wheel} is damaged, in {damaged}. {advice}")
    return Target(python, found[4], int(found[3]))


def pins(root: Path, target: Target, left_out: Sequence[str]) -> list[Pin]:
    """What the target needs by uv.lock, without FFCV, the packages in `left_out` and what only they need.

    Raises:
        UserError: uv.lock does not name one of `left_out`, or cannot be read.
    """
    try:
        entries = tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))["package"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise UserError(f"uv.lock cannot be read: {error}. Restore it: git checkout uv.lock") from None
    unknown = set(left_out) - {entry["name"] for entry in entries}
    if unknown:
        raise UserError(f"--system {' '.join(sorted(unknown))}: uv.lock names no such package.")
    with_wheels = {(entry["name"], entry["version"]) for entry in entries if entry.get("wheels")}
    command = ["uv", "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-header", "--no-annotate"]
    pruned = [word for name in left_out for word in ("--prune", name)]
    text = _run([*command, "--no-emit-package", "ffcv", *pruned], "uv.lock could not be read", cwd=root)
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        requirement = Requirement(line.split(" --hash=")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate(target.environment()):
            name, version = canonicalize_name(requirement.name), next(iter(requirement.specifier)).version
            hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
            found.append(Pin(name, version, hashes, (name, version) not in with_wheels))
    return found


def gather(folder: Path, locked: Sequence[Pin], target: Target, ffcv_wheel: Path) -> dict[str, str]:
    """Fill `folder` with the wheels, uv's among them, and `requirements.txt`; wheels that are there stay.

    Returns the SHA-256 of each wheel by its name.

    Raises:
        UserError: something could not be fetched or built, or is not what uv.lock names.
    """
    folder.mkdir(exist_ok=True)
    uv_version = _run(["uv", "--version"], "uv does not run").split()[1]
    with tempfile.TemporaryDirectory(prefix="cifar_dist-bundle-") as tools:
        pip = _pip(Path(tools))
        ready = [pin.line(pin.hashes) for pin in locked if not pin.source_only]
        _download(pip, ready, folder, target, "--require-hashes")
        _download(pip, [f"uv=={uv_version}"], folder, target)
        _build(pip, [pin for pin in locked if pin.source_only], folder)
    shutil.copy(ffcv_wheel, folder)
    return _keep(folder, locked, {"uv": uv_version, "ffcv": ffcv_wheel.name.split("-")[1]})


def _keep(folder: Path, locked: Sequence[Pin], others: dict[str, str]) -> dict[str, str]:
    """Check each wheel, remove what an earlier attempt with another uv.lock left, and list the rest for uv."""
    missing: dict[tuple[str, str], Pin | None] = {(pin.name, pin.version): pin for pin in locked}
    missing |= dict.fromkeys(others.items())
    sums, lines = {}, []
    for path in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(path.name)
        key = (str(name), str(version))
        if key not in missing:
            path.unlink()
            continue
        pin, digest = missing.pop(key), sha256(path)
        if pin and not pin.source_only and digest not in pin.hashes:
            raise UserError(f"{path} is not the file that uv.lock names. Remove it and try again.")
        if pin and pin.source_only and {tag.platform for tag in tags} != {"any"}:
            raise UserError(f"{path.name} was compiled for this machine; it serves no other.")
        sums[path.name] = digest
        if name != "uv":
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    if missing:
        raise UserError(f"no wheel came of {', '.join(name for name, _ in missing)}. Try again.")
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sums


def needed_glibc(names: Iterable[str]) -> int:
    """The minor version of glibc 2 that the wheels of these names need, each by its most modest tag."""
    return max(min(_glibc(tag) for tag in parse_wheel_filename(name)[3]) for name in names)


def _glibc(tag: Tag) -> int:
    found = re.match(r"manylinux_2_(\d+)_|(manylinux\d+)_", tag.platform)
    return 0 if found is None else int(found[1] or OLD_PLATFORMS[found[2]])


def _pip(folder: Path) -> list[str]:
    """The beginning of pip's command line, in an environment of its own."""
    complaint = "the tools that fetch the wheels could not be installed"
    _run(["uv", "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)], complaint)
    python = str(folder / "bin/python")
    _run(["uv", "pip", "install", "--quiet", "--no-deps", "--python", python, *TOOLS], complaint)
    return [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _download(pip: Sequence[str], lines: Sequence[str], folder: Path, target: Target, *options: str) -> None:
    wanted = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    wanted += [word for name in target.platforms() for word in ("--platform", name)]
    complaint = f"the wheels for Python {target.python} on {target.machine} could not be fetched"
    command = [*pip, "download", "--dest", str(folder), "--progress-bar", "off", *wanted, *options]
    _with_requirements(command, lines, folder, complaint)


def _build(pip: Sequence[str], source_only: Sequence[Pin], folder: Path) -> None:
    """Wheels of what exists as source only; the same source gives the same bytes."""
    if source_only:
        lines = [pin.line(pin.hashes) for pin in source_only]
        command = [*pip, "wheel", "--wheel-dir", str(folder), "--no-build-isolation", "--require-hashes"]
        names = ", ".join(pin.name for pin in source_only)
        _with_requirements(command, lines, folder, f"no wheels could be built of {names}")


def _with_requirements(command: Sequence[str], lines: Sequence[str], folder: Path, complaint: str) -> None:
    requirements = folder / f".{REQUIREMENTS}"
    requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run([*command, "--no-deps", "--requirement", str(requirements)], complaint)
    requirements.unlink()


def _run(command: Sequence[str], complaint: str, cwd: Path | None = None) -> str:
    """The output of a command; if it fails, the end of what it said is the error."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1577836800"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-12:])
        raise UserError(f"{complaint}:\n{tail}")
    return result.stdout
