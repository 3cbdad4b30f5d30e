"""FFCV's wheel: built by the script, installed by another user without compiler, X, OpenCV or TurboJPEG."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.wheels import LAUNCH, SYSTEM_PATH, build, made_wheel, other_python, script, stand_in, uv

pytestmark = pytest.mark.run
NOBODY = 65534
HIDDEN_LIBRARIES = re.compile(
    r"lib(opencv_|turbojpeg|jpeg|tbb|lapack|blas|openblas|gfortran|quadmath|X11|xcb|Xau|Xdmcp|bsd|md\.|GL|OpenGL|EGL)"
)
HIDDEN_PROGRAMS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "pkg-config", "pkgconf", "apt-get", "sudo")
GLIBC = re.compile(r"(lib(c|m|dl|pthread|rt)|ld-linux-[\w-]+)\.so\.\d+$")


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Path:
    return made_wheel(pytestconfig)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The scripts and the lock, without any environment."""
    copy = tmp_path / "my copy"
    shutil.copytree(LAUNCH, copy / "launch")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(runs.REPOSITORY / name, copy)
    return copy


def elf_files(wheel: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if path.read_bytes()[:4] == b"\x7fELF"]


@pytest.mark.slow
def test_nothing_but_glibc_is_loaded_from_outside(wheel: Path, tmp_path: Path) -> None:
    found = elf_files(wheel, tmp_path)
    assert {path.name for path in found} >= {"_libffcv.abi3.so", "libX11.so.6", "libstdc++.so.6", "libz.so.1"}
    outside = set()
    for path in found:
        listing = subprocess.check_output(["ldd", str(path)], text=True)
        assert "not found" not in listing
        for name, resolved in re.findall(r"(\S+) => (\S+)", listing):
            if not Path(resolved).resolve().is_relative_to(tmp_path.resolve()):
                outside.add(name)
    assert outside
    assert [name for name in outside if not GLIBC.match(name)] == []


@pytest.mark.slow
def test_the_name_says_which_glibc(wheel: Path, tmp_path: Path) -> None:
    """No library in the wheel may need a newer glibc than the platform tag promises."""
    promised = int(re.findall(r"manylinux_2_(\d+)_", wheel.name)[0])
    needed = [
        int(minor) for path in elf_files(wheel, tmp_path) for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())
    ]
    assert max(needed) == promised
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        tags = re.findall(r"^Tag: (.+)$", archive.read(metadata).decode(), flags=re.M)
    assert tags == ["-".join(wheel.stem.split("-")[2:])]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_python_loads_the_extension(wheel: Path, tmp_path: Path, version: str) -> None:
    python = other_python(version) or pytest.skip(f"no Python {version} on this machine to load FFCV's extension with")
    extension = next(path for path in elf_files(wheel, tmp_path) if path.name == "_libffcv.abi3.so")
    program = (
        "import sys, importlib.util as u; spec = u.spec_from_file_location('_libffcv', sys.argv[1]); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(sys.version_info[:2], module.__doc__)"
    )
    output = subprocess.check_output([python, "-c", program, str(extension)], text=True)
    assert output.startswith(f"({version.replace('.', ', ')}) This is a dummy python extension")


@pytest.mark.slow
@pytest.mark.long
def test_built_again_it_has_the_same_bytes(wheel: Path, copied: Path) -> None:
    again = Path(build(where=copied).splitlines()[-1])
    assert again.parent == copied / "dist"
    assert again.read_bytes() == wheel.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == [wheel.name]


@pytest.mark.slow
def test_another_source_archive_than_the_locked_one_is_refused(copied: Path, tmp_path: Path) -> None:
    lock = (copied / "uv.lock").read_text()
    sha256 = re.findall(r'/ffcv-[\d.]+tar.gz", hash = "sha256:(\w+)"', lock)[0]
    (copied / "uv.lock").write_text(lock.replace(sha256, sha256[::-1]))
    output = build("--out", tmp_path / "out", where=copied, expected=2)
    assert "DO NOT MATCH THE HASHES" in output
    assert output.splitlines()[-1].startswith("error: ffcv could not be fetched")
    assert len(output.splitlines()) < 24
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_wheel_that_needs_more_than_glibc_is_not_kept(copied: Path, tmp_path: Path) -> None:
    """The script without the line that adds what auditwheel takes for granted."""
    path = copied / "launch/build-ffcv-wheel"
    adding = 'cp -L "$path"'
    assert path.read_text().count(adding) == 1
    path.write_text(path.read_text().replace(adding, 'true "$path"'))
    output = build("--out", tmp_path / "out", where=copied, expected=2)
    message = output[output.index("error: ") :]
    for name in ("libX11.so.6", "libstdc++.so.6", "libz.so.1"):
        assert f"\n{name} /" in message
    assert "libc.so" not in message
    assert list((tmp_path / "out").iterdir()) == []


def test_build_explains_its_arguments() -> None:
    assert "--out DIR" in build("--help")
    assert "--out DIR" in build("--everything", expected=2)
    assert "cannot write into /dev/null/x" in build("--out", "/dev/null/x", expected=2)


def damaged(wheel: Path, folder: Path) -> Path:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    return written(folder, wheel.name, bytes(content))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_setup_refuses_other_wheels(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    wheel = stand_in(tmp_path / "good")
    good = wheel.read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("other-1.0.dist-info/METADATA", "Name: other\nVersion: 1.0\n")
    other = (tmp_path / "other.zip").read_bytes()
    platform = re.findall(r"manylinux\w+", wheel.name)[0]
    cases = [
        (tmp_path / "absent.whl", "there is no wheel at"),
        (tmp_path, "there is no wheel at"),
        (written(tmp_path, "other-1.0-py3-none-any.whl", other), "no wheel of ffcv"),
        (written(tmp_path, wheel.name.replace("-cp311", ".9-cp311"), good), "which uv.lock names"),
        (written(tmp_path, wheel.name, good[: len(good) // 2]), "is damaged"),
        (damaged(wheel, tmp_path), "is damaged"),
        (written(tmp_path, wheel.name, other), "no wheel of ffcv"),
        (written(tmp_path, wheel.name.replace("cp311", "cp399"), good), "CPython 3.99"),
        (written(tmp_path, wheel.name.replace(platform, "manylinux_2_99_x86_64"), good), "manylinux_2_99"),
    ]
    for path, message in cases:
        output = script("setup", "--ffcv-wheel", path, where=copied, expected=2)
        assert message in output, path
        assert output.startswith("error: ")
        assert len(output.splitlines()) <= 4
    assert not (copied / ".venv").exists()


def test_setup_says_how_to_get_uv(copied: Path, tmp_path: Path) -> None:
    """On a machine with almost nothing on PATH."""
    wheel = stand_in(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "env", "readlink", "sha256sum"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    command = ["bash", str(copied / "launch/setup"), "--ffcv-wheel", str(wheel)]
    result = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install --user uv" in result.stderr
    assert len(result.stderr.splitlines()) == 3


def test_setup_explains_its_arguments() -> None:
    assert "--ffcv-wheel PATH" in script("setup", "--help")
    assert "--ffcv-wheel PATH" in script("setup", "--ffcv-whele=x", expected=2)
    assert "needs the path" in script("setup", "--ffcv-wheel", expected=2)


def files_to_hide() -> list[str]:
    """The libraries that the wheel brings, as this machine has them, and what could compile or install."""
    listing = subprocess.check_output(["/sbin/ldconfig", "-p"], text=True)
    libraries = [path for name, path in re.findall(r"(\S+) .*=> (\S+)", listing) if HIDDEN_LIBRARIES.match(name)]
    programs = [path for name in HIDDEN_PROGRAMS if (path := shutil.which(name, path=SYSTEM_PATH))]
    return sorted({str(Path(path).resolve()) for path in libraries + programs})


class BareMachine:
    """This machine as a cluster's node: a user without rights, no compiler, no X11, OpenCV, TurboJPEG, TBB, LAPACK."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repository = home / "cifar dist"

    def run(self, *words: str | Path) -> str:
        hide = 'set -e\nfor path in {}; do mount --bind /dev/null "$path"; done\nexec "$@"'
        hidden = " ".join(f"'{path}'" for path in files_to_hide())
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", hide.format(hidden), "sh", "setpriv", f"--reuid={NOBODY}",
             f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *map(str, words)],
            cwd=self.home,
            env=os.environ
            | {"HOME": str(self.home), "PATH": f"{self.home}/bin:{SYSTEM_PATH}", "TMPDIR": f"{self.home}/tmp",
               "UV_CACHE_DIR": f"{self.home}/cache", "UV_LINK_MODE": "symlink", "UV_PYTHON": "", "MPLCONFIGDIR": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        return runs.finish(process)


def lend_cache(target: Path) -> None:
    """uv's cache for another user, as hard links: gigabytes that nobody downloads again. No FFCV compiled here."""
    source = subprocess.check_output([uv(), "cache", "dir"], text=True).strip()
    if Path(source).is_dir():
        # Files that others are writing at this moment may vanish before they are linked.
        subprocess.run(["cp", "-al", source, str(target)], stderr=subprocess.DEVNULL, check=False)
    for compiled in target.glob("sdists-*/*/ffcv"):
        shutil.rmtree(compiled)
    # uv opens its marks and locks for writing.
    for mark in [path for depth in ("*", "*/*") for path in target.glob(depth) if path.is_file()]:
        content = mark.read_bytes()
        mark.unlink()
        mark.write_bytes(content)
        os.chown(mark, NOBODY, NOBODY)


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    trial = ["unshare", "--mount", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "true"]
    if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT TESTED: FFCV's wheel on a machine without its libraries (unshare --mount needs root)")
    # Not tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="cifar_dist-wheel-") as name:
        home = Path(name)
        for folder in ("bin", "tmp"):
            (home / folder).mkdir()
        shutil.copy(uv(), home / "bin")
        lend_cache(home / "cache")
        bare = BareMachine(home)
        bare.repository.mkdir()
        for part in ("launch", "cifar_dist", "configs"):
            shutil.copytree(runs.REPOSITORY / part, bare.repository / part)
        for part in ("pyproject.toml", "uv.lock", "README.md", "tests/support/ffcv_round_trip.py"):
            shutil.copy(runs.REPOSITORY / part, bare.repository)
        # Folders alone: the files in the cache are also those of its owner.
        for folder, _, _ in os.walk(home):
            os.chown(folder, NOBODY, NOBODY)
        yield bare


@pytest.mark.slow
def test_setup_from_the_wheel_on_a_bare_machine(wheel: Path, machine: BareMachine) -> None:
    shutil.copy(wheel, machine.home)
    (machine.home / wheel.name).chmod(0o644)
    setup = machine.repository / "launch/setup"
    python = machine.repository / ".venv/bin/python"
    probe = (
        "import ctypes, sys\nfor name in sys.argv[1:]:\n  try: ctypes.CDLL(name); print(name)\n  except OSError: pass"
    )
    names = ("libX11.so.6", "libGLX.so.0", "libturbojpeg.so.0", "liblapack.so.3", "libtbb.so.12", "libc.so.6")

    output = machine.run(setup, "--ffcv-wheel", wheel.name)
    assert output.splitlines()[-1] == "setup: done"
    assert machine.run(python, "-c", probe, *names).split() == ["libc.so.6"]
    read_back = json.loads(machine.run(python, machine.repository / "ffcv_round_trip.py", "x.beton").splitlines()[-1])
    assert [read_back[key] for key in ("raw", "label")] == [0, 0]
    assert read_back["resized"] <= 1
    assert read_back["jpeg"] <= 20  # of 255
    assert read_back["shapes"] == [[24, 32, 32, 3], [24, 32, 32, 3], [24, 12, 12, 3], [24]]
    loaded = [Path(path) for path in read_back["libraries"]]
    assert sum(path.name.startswith("libstdc++") for path in loaded) == 1
    assert sum("/ffcv.libs/" in str(path) for path in loaded) >= 10

    # It says "installing" before it does so.
    stamp = machine.repository / ".venv/.complete"
    before = stamp.stat().st_mtime_ns
    assert machine.run(setup) == ""
    assert machine.run(setup, f"--ffcv-wheel={wheel.name}") == ""
    assert stamp.stat().st_mtime_ns == before


def test_container_is_made_by_setup_alone() -> None:
    """slurm/cifar_dist.def copies what the repository needs and leaves all installing to launch/setup."""
    text = (runs.REPOSITORY / "slurm/cifar_dist.def").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^%(\w+)\n((?: .*\n|\n)+)", text, flags=re.M))
    assert list(sections) == ["files", "post", "environment", "runscript"]
    copies = [line.split() for line in sections["files"].strip().splitlines()]
    assert all(
        (runs.REPOSITORY / source).exists() and target == f"/opt/cifar_dist/{source}" for source, target in copies
    )
    assert {"launch", "cifar_dist", "configs", "uv.lock", "pyproject.toml", "README.md"} <= {copy[0] for copy in copies}
    steps = [line.split()[0] for line in sections["post"].strip().splitlines()]
    assert steps == ["cd", "./launch/setup", "rm"]
    assert re.search("^From: python:3.11-slim-bookworm$", text, flags=re.M)
