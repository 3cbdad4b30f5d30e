"""What must be installed: packages, FFCV, a compiler."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cifar_dist.diagnosis.checks import CHECKS, Finding, Folders, Status
from cifar_dist.diagnosis.devices import nvidia_files
from cifar_dist.errors import one_line
from cifar_dist.offline.check_installed import problem, requirements

_PRINTED = ("torch", "ffcv", "numba", "numpy", "wandb")
_NUM_IMAGES = 64
_LIBRARIES = (
    "A library of the system is missing; Debian: apt-get install libopencv-dev libturbojpeg0-dev. "
    "A wheel of FFCV brings them: ./launch/setup --ffcv-wheel PATH"
)


def versions() -> dict[str, str | None]:
    """Of Python, this package and its direct requirements, read without importing them; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("cifar_dist", *(item.name for item in requirements())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def packages(_: Folders) -> Iterator[Finding]:
    """Direct requirements, as pyproject.toml has them."""
    for text in filter(None, map(problem, requirements())):
        yield Finding("problem", text, _install(text.split()[0]))
    found = versions()
    names = ", ".join(f"{name} {found[name]}" for name in _PRINTED if found.get(name))
    yield Finding("ok", f"Python {found['python']}, {names}; {sys.executable}")


def ffcv(_: Folders) -> Iterator[Finding]:
    """FFCV, compiled for this Python: it reads what was written."""
    started = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open a GPU
    try:
        import numpy as np
        import torch

        from cifar_dist.data.loader import BetonLoader
        from cifar_dist.data.prepare import beton
    except Exception as error:  # noqa: BLE001 - of libraries, which raise anything
        advice = _LIBRARIES if "shared object" in str(error) else _install("ffcv")
        yield Finding("problem", f"FFCV cannot be imported: {one_line(error)}", advice)
        return
    order = np.arange(_NUM_IMAGES)
    images = np.random.default_rng(0).integers(0, 256, (_NUM_IMAGES, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory(prefix="cifar_dist-") as folder:
        path = Path(folder, "check.beton")
        beton.write(path, images, order)
        with BetonLoader(path, torch.device("cpu")) as loader:
            batch = next(loader.read(order, _NUM_IMAGES))
    read = batch.images.permute(0, 2, 3, 1).numpy()
    if not (np.array_equal(read, images) and np.array_equal(batch.labels.numpy(), order)):
        yield Finding("problem", "FFCV reads other images than were written", _install("ffcv"))
        return
    seconds = time.monotonic() - started
    yield Finding("ok", f"imported with torch {torch.__version__}, and {_NUM_IMAGES} images read, in {seconds:.1f} s")


def _install(name: str) -> str:
    """How to install a package (again) into the Python that runs this."""
    if Path(sys.prefix).name == ".venv":
        return "rm -r .venv && ./launch/setup    (without a compiler: ./launch/setup --ffcv-wheel PATH)"
    pin = next((str(item) for item in requirements() if item.name == name), name)
    return f"{sys.executable} -m pip install --force-reinstall --no-deps '{pin}'"


def compiler(_: Folders) -> Iterator[Finding]:
    """On GPUs torch.compile is on, for which Triton compiles C; on CPUs, where it needs C++, it is off by default."""
    status: Status
    known: tuple[str, ...]
    if nvidia_files():
        status, language, known, use = "problem", "c", ("gcc", "clang"), "torch.compile needs it for GPUs"
    else:
        status, language, known = "warning", "c++", ("c++", "g++", "clang++")
        use = "--train.compile on needs it, and installing FFCV"
    given = os.environ.get("CC" if language == "c" else "CXX", "")
    program = next(filter(None, map(shutil.which, (given, *known))), None)
    if program is None:
        yield Finding(status, f"there is no {language.upper()} compiler; {use}", CHECKS["compiler"].advice)
        return
    code = "#include <Python.h>\nint main(void) { return 0; }\n"
    words = [program, "-x", language, "-I", sysconfig.get_path("include"), "-o", "/dev/null", "-c", "-"]
    done = subprocess.run(words, input=code, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        found = f"{program} cannot compile with Python's headers; {use}: {one_line(reason)}"
        yield Finding(status, found, CHECKS["compiler"].advice)
        return
    yield Finding("ok", f"{program} compiles with Python's headers")
