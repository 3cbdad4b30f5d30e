"""A real bundle: making it is interrupted; it installs without network beside a torch of the machine; use; damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cifar_dist.errors import UserError
from cifar_dist.offline import check_installed
from cifar_dist.offline.bundle import Target, locked_requirements
from cifar_dist.training.summary import bundle_commit
from tests.support import runs
from tests.support.wheels import (
    LAUNCH,
    SYSTEM_PATH,
    environment,
    made_wheel,
    need_a_checkout,
    other_python,
    script,
    stand_in,
    uv,
)  # fmt: skip

pytestmark = [pytest.mark.run, pytest.mark.data]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# In a network namespace: brings up the loopback interface, which a machine without network has, too.
ALONE = (
    "import fcntl, os, socket, struct, sys; "
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41)); os.execvp(sys.argv[1], sys.argv[1:])"
)
TINY = ("--model.width", "0.0625", "--data.subset", "256", "--train.max_steps", "2", "--eval.tta", "none",
        "--eval.bn_samples", "250")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Path:
    need_a_checkout()
    return made_wheel(pytestconfig)


@pytest.fixture(scope="module")
def bundle(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for this Python and a torch of the machine. Making it was killed once and repeated."""
    out = tmp_path_factory.mktemp("bundle") / "my bundle"
    arguments: list[str | Path] = ["--out", out, "--python", PYTHON, "--system-torch", "--ffcv-wheel", wheel]

    def downloaded() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.parent.glob(f".{out.name}.wheels-*/*.whl")}

    words = [str(LAUNCH / "bundle"), *map(str, arguments)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs.wait_until(lambda: len(downloaded()) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    kept = downloaded()

    output = script("bundle", *arguments)
    assert {path.name for path in out.parent.iterdir()} == {out.name, f".{out.name}.lock"}
    again = {path.name: path.stat().st_mtime_ns for path in (out / "wheels").glob("*.whl")}
    assert sum(again.get(name) == stamp for name, stamp in kept.items()) >= 2  # one may have been half-written
    assert re.search(r"is complete, \d+ MB", output)
    assert re.search(
        rf"needs Linux on \w+, Python {PYTHON}, glibc 2\.\d+ or newer, and torch>=2\.11, torchvision>=0\.26 i", output
    )
    assert output.splitlines()[-1] == "  cd 'my bundle' && ./launch/measure"
    return out


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.slow
def test_bundle_holds_the_tracked_files_only(bundle: Path) -> None:
    listing = subprocess.check_output(["git", "-C", str(runs.REPOSITORY), "ls-files", "-z"], text=True)
    tracked = {name for name in listing.split("\0") if name}
    data = {"data/train.beton", "data/test.beton"}
    rest = names(bundle) - tracked - data
    assert {name for name in rest if not name.startswith("wheels/")} == {"SHA256SUMS", "COMMIT"}
    assert names(bundle) >= tracked | data
    for name in tracked:
        assert (bundle / name).read_bytes() == (runs.REPOSITORY / name).read_bytes()
        assert os.access(bundle / name, os.X_OK) == os.access(runs.REPOSITORY / name, os.X_OK)
    assert {line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()} == names(bundle) - {
        "SHA256SUMS"
    }
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle, check=True)


@pytest.mark.slow
def test_its_wheels_are_the_locked_ones_without_torchs(bundle: Path) -> None:
    found = {path.name.split("-")[0].lower() for path in (bundle / "wheels").glob("*.whl")}
    assert found >= {"ffcv", "uv", "numpy", "numba", "llvmlite", "tyro", "fastargs", "wandb", "opencv_python_headless"}
    assert not [name for name in found if name.startswith(("torch", "nvidia", "triton", "cuda", "pytest"))]
    lines = (bundle / "wheels/requirements.txt").read_text().splitlines()
    lock = (runs.REPOSITORY / "uv.lock").read_text()
    for line in lines:
        name, _, digest = re.fullmatch(r"([\w-]+)==(\S+) --hash=sha256:(\w{64})", line).groups()  # type: ignore[union-attr]
        assert name in ("ffcv", "assertpy", "fastargs") or f"sha256:{digest}" in lock
    assert len(lines) == len(list((bundle / "wheels").glob("*.whl"))) - 1  # uv is there to run


@pytest.fixture(scope="module")
def system_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with torch and torchvision in an environment of its own, as GPU images have it, and nothing of ours."""
    folder = tmp_path_factory.mktemp("image")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(runs.REPOSITORY / name, folder)
    project = folder / "pyproject.toml"
    export = [uv(), "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-header", "--no-annotate",
              "--no-hashes", "--project", str(folder)]  # fmt: skip
    everything = set(re.findall(r"^[\w-]+", subprocess.check_output(export, text=True), flags=re.M))
    pruned = subprocess.check_output([*export, "--prune", "torch", "--prune", "torchvision"], text=True)
    ours = set(re.findall(r"^[\w-]+", pruned, flags=re.M)) - {"numpy", "pillow", "typing-extensions", "filelock"}
    assert everything - ours >= {"torch", "torchvision", "numpy", "sympy"}
    left_out = [word for name in sorted(ours) for word in ("--no-install-package", name)]
    sync = [uv(), "sync", "--quiet", "--frozen", "--no-dev", "--no-install-project", "--compile-bytecode", "--python",
            sys.executable, "--project", str(project.parent), *left_out]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    subprocess.run(sync, check=True, env=clean)
    return folder / ".venv/bin/python"


def offline(where: Path, home: Path, *words: str | Path, python: str | Path = "", expected: int = 0) -> str:
    """Run a command of the bundle in `where` on a machine without network, uv, or anything in the home directory."""
    alone = ["unshare", "--net", sys.executable, "-S", "-c", ALONE]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT TESTED: a bundle without network (unshare --net needs root)")
    home.mkdir(exist_ok=True)
    command = [*alone, str(where / words[0]), *map(str, words[1:])]
    clean = {"PATH": SYSTEM_PATH, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "UV_PYTHON": str(python)}
    process = subprocess.Popen(
        command, cwd=where, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return runs.finish(process, expected)


def copy_of(bundle: Path, folder: Path) -> Path:
    """Another copy, as hard links; a file in it is changed by writing a new one."""
    subprocess.run(["cp", "-al", str(bundle), str(folder)], check=True)
    return folder


@pytest.mark.slow
def test_measures_without_network(bundle: Path, system_python: Path, tmp_path: Path) -> None:
    """The one command there: set-up, a benchmark, a run and the table; then again, with nothing to do."""
    here = copy_of(bundle, tmp_path / "copied here")
    config = here / "configs/tiny.yaml"
    config.write_text((here / "configs/quickstart.yaml").read_text())
    measure = ("launch/measure", "--bench", "loader --seconds 0.05 --repeats 1",
               "--configs", config, *TINY)  # fmt: skip
    output = offline(here, tmp_path / "home", *measure, python=system_python)
    results = here / "results"
    rows = output[output.rindex("what  ") :].splitlines()
    assert rows[:3] == (results / "table.txt").read_text().splitlines()
    assert rows[1].startswith("bench loader")
    assert "in results/bench.json" in rows[1]
    assert re.match(r"tiny +test [\d.]+% after [\d.]+ s of training +\d+$", rows[2])
    assert list(json.loads((results / "bench.json").read_text())["parts"]) == ["loader"]
    figures = runs.summary(results / "tiny")
    commit = (bundle / "COMMIT").read_text().strip()
    assert figures["git_commit"] == commit
    assert figures["steps"] == 2
    assert {path.name for path in (results / "tiny").iterdir()} == {
        "config.yaml", "metrics.jsonl", "curves.png", "summary.json", "output.log"
    }  # fmt: skip
    assert len(list(here.glob("runs/results-*-tiny/checkpoints/*.pt"))) >= 1
    # Numpy is the bundle's, although the image has one; torch is the image's.
    probe = "import numpy, torch, cifar_dist; print(numpy.__file__, torch.__file__, cifar_dist.__file__, sep='\\n')"
    places = offline(here, tmp_path / "home", ".venv/bin/python", "-c", probe).splitlines()
    owners = [here / ".venv", system_python.parents[1], here]
    assert [Path(place).is_relative_to(owner) for place, owner in zip(places, owners, strict=True)] == [True] * 3
    assert "--nproc-per-node" in offline(here, tmp_path / "home", ".venv/bin/torchrun", "--help")
    assert list((tmp_path / "home").rglob("uv")) == []

    # With nothing to do it says nothing; before it checks or installs it would.
    stamp = here / ".venv/.complete"
    before = stamp.stat().st_mtime_ns
    assert offline(here, tmp_path / "home", "launch/setup", python=system_python) == ""
    assert stamp.stat().st_mtime_ns == before
    (here / "cifar_dist/train.py").unlink()
    assert bundle_commit(here) == (commit if commit.endswith("-dirty") else f"{commit}-dirty")


def rewrite(path: Path, change: bytes) -> None:
    """Another file in its place, since this one may be shared with other copies."""
    path.unlink()
    path.write_bytes(change)


@pytest.mark.slow
def test_damaged_files_are_named(bundle: Path, system_python: Path, tmp_path: Path) -> None:
    numpy = next(bundle.glob("wheels/numpy-*.whl")).name
    damaged = bytearray((bundle / "wheels" / numpy).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data = bytearray((bundle / "data/test.beton").read_bytes())
    data[-1] ^= 1
    target = (bundle / "wheels/TARGET").read_bytes()
    cases = [
        (f"wheels/{numpy}", bytes(damaged), f"{numpy} is damaged"),
        (f"wheels/{numpy}", None, f"{numpy} is missing"),
        ("data/test.beton", bytes(data), "data/test.beton is damaged"),
        ("cifar_dist/cluster/launcher.py", None, "cifar_dist/cluster/launcher.py is missing"),
        ("SHA256SUMS", None, "is not complete"),
        ("wheels/SHA256SUMS", None, "is not complete"),
        ("wheels/SHA256SUMS", b"nothing\n", "not readable"),
        ("wheels/TARGET", None, "is not complete"),
        ("wheels/TARGET", re.sub(b"machine .*", b"machine s390x", target), "for Linux s390x, and this is Linux"),
        ("wheels/TARGET", re.sub(b"glibc .*", b"glibc 2.99", target), "need glibc 2.99 or newer, and this machine has"),
        ("wheels/TARGET", target + b"\n", "TARGET is damaged"),
    ]
    for number, (name, content, message) in enumerate(cases):
        here = copy_of(bundle, tmp_path / f"copy {number}")
        (here / name).unlink() if content is None else rewrite(here / name, content)
        output = offline(here, tmp_path / "home", "launch/setup", python=system_python, expected=2)
        assert message in output, (name, message)
        assert len(output.splitlines()) <= 6
        assert not (here / ".venv").exists()
        shutil.rmtree(here)


@pytest.mark.slow
def test_another_python_is_refused(bundle: Path, tmp_path: Path) -> None:
    here = copy_of(bundle, tmp_path / "copy")
    rewrite(here / "configs/debug.yaml", b"{}\n")
    bare = Path(sys.base_prefix) / "bin/python3"
    other = next((found for version in ("3.12", "3.13", "3.10") if (found := other_python(version))), "")
    refusals = {str(bare): f"{bare} has no torch", other or "/nowhere": f"{other} is Python 3." if other else "is none"}
    for python, message in refusals.items():
        output = offline(here, tmp_path / "home", "launch/setup", python=python, expected=2)
        assert f"error: the wheels are for Python {PYTHON} with torch>=2.11, torchvision>=0.26 of its own" in output
        assert message in output
        assert "note: not as it was bundled: configs/debug.yaml" in output
        assert len(output.splitlines()) <= 8
    assert not (here / ".venv").exists()


def test_bundle_refusals(tmp_path: Path) -> None:
    need_a_checkout()
    (tmp_path / "good").mkdir()
    wheel = stand_in(tmp_path / "good")
    users = tmp_path / "users"
    users.mkdir()
    (users / "mine.txt").write_text("weeks of work")
    half = tmp_path / "half.whl"
    half.write_bytes(wheel.read_bytes()[:1000])
    cut = tmp_path / wheel.name
    cut.write_bytes(wheel.read_bytes()[:-1000])
    given = ("--ffcv-wheel", str(wheel))
    cases = [
        ((*given, "--out", str(users)), "exists already. Remove it, or choose another --out."),
        ((*given, "--out", "/dev/null/x"), "could not be written"),
        ((*given, "--python", "three"), "python is three"),
        ((*given, "--python", "3.9"), "needs Python 3.11 or newer"),
        ((*given, "--system", "numpi"), "uv.lock names no such package"),
        (("--ffcv-wheel", str(half)), "half.whl is no wheel of ffcv"),
        (("--ffcv-wheel", str(cut)), ".whl is damaged"),
        (("--ffcv-wheel", "/nowhere.whl"), "there is no wheel at /nowhere.whl"),
        (("--everything",), "knows no argument --everything"),
        (("--out",), "--out needs a value"),
    ]
    for arguments, message in cases:
        out = () if "--out" in arguments else ("--out", str(tmp_path / "out"))
        output = script("bundle", *arguments, *out, expected=2)
        assert message in output, arguments
        assert len(output.splitlines()) <= 4
    assert (users / "mine.txt").read_text() == "weeks of work"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.partial"))
    assert "--system-torch" in script("bundle", "--help")


def test_only_in_a_git_checkout(tmp_path: Path) -> None:
    wheel = stand_in(tmp_path)
    shutil.copytree(runs.REPOSITORY / "cifar_dist", tmp_path / "cifar_dist")
    command = [
        sys.executable,
        "-m",
        "cifar_dist.offline.bundle",
        "--ffcv_wheel",
        str(wheel),
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"{tmp_path} is no git checkout" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.14"])
def test_requirements_are_the_locked_ones_for_the_other_python(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", environment()["PATH"])
    lock = (runs.REPOSITORY / "uv.lock").read_text()
    target = Target(version, "x86_64", "2.36", "")

    def packages(*system: str) -> dict[str, str]:
        return dict(line.split("==") for line in locked_requirements(target, system))

    everything, small = packages(), packages("torch", "torchvision")
    numpy, *hashes = everything["numpy"].split(" --hash=")
    minor = version.split(".")[1]
    assert f"/numpy-{numpy}-cp3{minor}-cp3{minor}-manylinux" in lock
    assert [digest for digest in hashes if f'"{digest.strip()}"' not in lock] == []
    assert {"torch", "torchvision", "triton", "sympy", "nvidia-cudnn-cu13"} <= set(everything) - set(small)
    assert {"assertpy", "fastargs", "wandb"} <= set(small)
    assert not {"ffcv", "cifar-dist", "opencv-python", "colorama", "pytest"} & set(everything)
    with pytest.raises(UserError, match=r"torche: uv\.lock names no such package"):
        packages("torche")


def test_check_installed() -> None:
    """In this environment, which is the locked one."""
    check_installed.main()
    assert check_installed.problem(Requirement("numpy>=99")).startswith("numpy>=99 is required, and 2.")
    assert check_installed.problem(Requirement("nowhere")) == "nowhere is not installed"
