"""Other versions than the locked ones: the lowest of pyproject.toml, and those of GPU images: Python 3.12, torch 2.11.

In the second environment, without what such images lack, `launch/measure --lean` measures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.wheels import environment, made_wheel, need_a_checkout, other_python, script, uv

pytestmark = [pytest.mark.slow, pytest.mark.run, pytest.mark.data, pytest.mark.timeout(1500)]
NEWEST = "2026-11-28T00:00:00Z"  # later releases are left out, so that the environments stay as they were tried
CURRENT = f"{sys.version_info.major}.{sys.version_info.minor}"
# By name: the version of Python, options of uv, and packages to leave out.
ENVIRONMENTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "lowest": (CURRENT, ("--resolution", "lowest-direct"), ()),
    "of GPU images": ("3.12", (), ()),
    # What launch/bundle --lean brings, and what measuring does without.
    "a GPU image": ("3.12", (), ("ffcv", "tyro", "typeguard", "docstring-parser", "wandb", "pytest")),
}
TORCH = "torch==2.11.*\ntorchvision==0.26.*\n"
PYTEST = ("pytest", "pytest-timeout", "pytest-xdist", "execnet", "pluggy", "iniconfig", "pygments")
TESTS = (
    "models", "data/test_augment.py", "data/test_loader.py", "test_config.py", "training/test_train_step.py",
    "training/test_flat_network.py", "training/test_compiled_graphs.py", "training/test_checkpoint.py",
    "training/test_muon.py",
)  # fmt: skip
OF_LOWEST = ("tracking/test_tracker.py",)  # pyproject.toml says why W&B's lowest version is that one
LONGEST = "tests/unit/training/test_train_step.py::test_tracing_for_compilation_changes_nothing[sgd and two sizes]"
LONG = "cache_of_compiled_code or break_is_seen or recompilation or without_norm or does_not_help"


def python_of(name: str, folder: Path, wheel: Path) -> Path:
    """The Python of a new environment in `folder`."""
    version, options, left_out = ENVIRONMENTS[name]
    found = other_python(version)
    if not found:
        pytest.skip(f"NOT TESTED: other versions of packages (no Python {version} on this machine)")
    (folder / "overrides.txt").write_text("opencv-python ; sys_platform == 'never'\n")
    (folder / "constraints.txt").write_text(TORCH)
    words = ["pip", "compile", "--quiet", "--python-version", version, "--exclude-newer", NEWEST, *options]
    words += ["--constraint", f"{folder}/constraints.txt", "--override", f"{folder}/overrides.txt"]
    words += ["--no-emit-package", "ffcv", "--output-file", f"{folder}/requirements.txt", "pyproject.toml"]
    subprocess.run([uv(), *words], check=True, cwd=runs.REPOSITORY)
    python = folder / ".venv/bin/python"
    subprocess.run([uv(), "venv", "--quiet", "--no-project", "--python", found, folder / ".venv"], check=True)
    tools = [f"{name}=={metadata.version(name)}" for name in PYTEST]
    words = ["pip", "install", "--quiet", "--python", str(python), "--no-deps", str(wheel), *tools]
    subprocess.run([uv(), *words, "--requirement", folder / "requirements.txt"], check=True)
    if left_out:
        subprocess.run([uv(), "pip", "uninstall", "--quiet", "--python", str(python), *left_out], check=True)
    return python


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Path:
    return made_wheel(pytestconfig)


@pytest.mark.parametrize("name", [pytest.param("lowest", marks=pytest.mark.long), "of GPU images"])
def test_other_versions(name: str, wheel: Path, data_dir: Path, tmp_path: Path) -> None:
    """The tests of what depends on torch, and a run of two processes."""
    python = python_of(name, tmp_path, wheel)
    clean = os.environ | {"PYTHONPATH": str(runs.REPOSITORY), "CIFAR_DIST_TEST_DATA": str(data_dir)}
    clean = {name: value for name, value in clean.items() if not name.startswith("PYTEST_")}
    tests = [f"tests/unit/{file}" for file in TESTS + (OF_LOWEST if name == "lowest" else ())]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({LONG})", *tests]
    command += ["--deselect", LONGEST]
    subprocess.run(command, cwd=runs.REPOSITORY, env=clean, check=True)

    words = [runs.REPOSITORY / "launch/node", *runs.SMALL, "--data.dir", data_dir, "--run.dir", tmp_path / "run"]
    several = clean | {"CIFAR_DIST_PYTHON": str(python), "NPROC_PER_NODE": "2"}
    subprocess.run([*map(str, words), "--train.max_steps", "4"], cwd=tmp_path, env=several, check=True)
    assert runs.summary(tmp_path / "run")["versions"]["torch"].startswith("2.11.")


@pytest.mark.long
def test_measuring_from_a_lean_bundle(wheel: Path, tmp_path: Path) -> None:
    need_a_checkout()
    script("bundle", "--lean", "--out", tmp_path / "made", "--ffcv-wheel", wheel)
    pieces = sorted((tmp_path / "made").iterdir())
    sizes = [sum(file.stat().st_size for file in piece.iterdir()) for piece in pieces]
    assert len(pieces) == 3
    assert max(sizes) <= 60 << 20
    python = python_of("a GPU image", tmp_path, wheel)
    there = tmp_path / "machine"  # the files of the checkout, and the pieces, copied into one folder
    there.mkdir()
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=runs.REPOSITORY)
    archive = subprocess.run(["tar", "c", "--null", "-T", "-"], cwd=runs.REPOSITORY, input=names, check=True,
                             stdout=subprocess.PIPE)  # fmt: skip
    subprocess.run(["tar", "x"], cwd=there, input=archive.stdout, check=True)
    for piece in pieces:
        shutil.copytree(piece, there / "lean", dirs_exist_ok=True)
    clean = {"PATH": environment()["PATH"], "HOME": str(tmp_path), "UV_PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    clean["NPROC_PER_NODE"] = "1"

    def measure(part: str, expected: int = 0) -> str:
        words = [str(there / "launch/measure"), "--lean", "lean", "--part", part, "--short"]
        done = subprocess.run(words, cwd=there, env=clean, check=False, stdout=subprocess.PIPE, text=True)
        assert done.returncode == expected, done.stdout
        return done.stdout

    for part in "1234":
        assert "FAILED" not in measure(part)
    results = json.loads((there / "results-short/results.json").read_text())
    assert results.keys() >= {
        "augment.txt", "bench-pooled.json", "debug/summary.json", "speed-94/summary.json", "unchanged/summary.json",
        "not-merged/summary.json", "sgd/summary.json", "not-compiled/summary.json", "speed-96/summary.json",
        "equal.txt", "killed.txt", "bench-cifar-8.json", "profile-94.txt", "profile-96.txt", "table-2.txt",
    }  # fmt: skip
    assert not (there / ".venv").exists()
    assert measure("4").count(" before\n") == 3
    (there / "lean/data_batch_3.webp").unlink()
    measure("4", expected=2)
