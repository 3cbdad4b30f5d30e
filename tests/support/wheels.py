"""FFCV's wheel and the scripts around it, for the tests of launch/setup, launch/build-ffcv-wheel and launch/bundle."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import pytest

from tests.support import runs

LAUNCH = runs.REPOSITORY / "launch"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def made_wheel(config: pytest.Config) -> Path:
    """The wheel of launch/build-ffcv-wheel, kept below .pytest_cache until the script or uv.lock changes.

    Two workers that ask at once build it once.
    """
    inputs = [LAUNCH / "build-ffcv-wheel", LAUNCH / "lib/installing.sh", runs.REPOSITORY / "uv.lock"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    assert config.cache is not None
    folder = config.cache.mkdir("ffcv-wheel") / key
    with filelock.FileLock(f"{folder}.lock"):
        made = list(folder.glob("*.whl"))
        if not made:
            if os.geteuid() != 0 and subprocess.run(["pkg-config", "--exists", "opencv4"], check=False).returncode != 0:
                pytest.skip("NOT TESTED: FFCV's wheel (no headers to compile it on this machine, and you are not root)")
            output = build("--out", folder)
            made = list(folder.glob("*.whl"))
            assert [str(path) for path in made] == output.splitlines()[-1:]
    assert re.fullmatch(r"ffcv-[\d.]+-cp311-abi3-manylinux_2_\d+_\w+\.whl", made[0].name)
    return made[0]


def need_a_checkout() -> None:
    if not (runs.REPOSITORY / ".git").exists():
        pytest.skip("NOT TESTED: launch/bundle (this is no git checkout)")


def stand_in(folder: Path) -> Path:
    """A file that passes for FFCV's wheel until something is installed from it: for what is refused before that."""
    lock = (runs.REPOSITORY / "uv.lock").read_text(encoding="utf-8")
    version = re.findall(r'^name = "ffcv"\nversion = "([\d.]+)"$', lock, flags=re.M)[0]
    path = folder / f"ffcv-{version}-cp311-abi3-manylinux_2_28_{platform.machine()}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ffcv/_libffcv.abi3.so", bytes(100_000))
        archive.writestr(f"ffcv-{version}.dist-info/METADATA", f"Name: ffcv\nVersion: {version}\n")
    return path


def environment() -> dict[str, str]:
    """With the uv that launch/setup uses on PATH, so that a copy of the scripts need not install one."""
    return os.environ | {"PATH": f"{os.environ['PATH']}:{runs.REPOSITORY / '.uv/bin'}"}


def uv() -> str:
    found = shutil.which("uv", path=environment()["PATH"])
    assert found is not None
    return found


def script(name: str, *arguments: str | Path, where: Path = runs.REPOSITORY, expected: int = 0) -> str:
    process = subprocess.Popen(
        [str(where / "launch" / name), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return runs.finish(process, expected)


def build(*arguments: str | Path, where: Path = runs.REPOSITORY, expected: int = 0) -> str:
    return script("build-ffcv-wheel", *arguments, where=where, expected=expected)


def other_python(version: str) -> str:
    """A Python of that version, if this machine has one: the one at work, or one of uv's or pyenv's; or nothing."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    command = [uv(), "python", "find", "--no-project", "--no-python-downloads", version]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += [str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python")]
    return found[0] if found else ""
