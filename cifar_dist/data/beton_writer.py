"""Write .beton files: FFCV's writer in a child process, watched.

The child keeps FFCV's import, its output and whatever may go wrong in it away from this process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_dist.data.beton_format import NUM_CLASSES, Layout
from cifar_dist.errors import DataError

Say = Callable[[str], None]
Files = Mapping[Path, tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]  # images and labels of each


def write_betons(files: Files, say: Say, stall_s: float = 300.0) -> None:
    """Write files of the fields image, label and index (the sample's position); return when they are on disk.

    Each value is (images uint8 (N, 32, 32, 3), labels of an integer type (N,) from 0 to 9). FFCV works in one
    child process, which costs its import (5 to 15 s) once; it is killed when it has written nothing for
    `stall_s` seconds, and ends when this process does. A call that fails leaves nothing behind; one that is
    killed leaves incomplete files, so write into a folder of your own and rename.

    Raises:
        DataError: a path exists, the disk is too small or became full, or the child failed, died or stalled.
        OSError: a folder does not exist or cannot be written.
        ValueError: the arrays have other shapes, types or values.
    """
    for path, (images, labels) in files.items():
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or len(labels) == 0:
            found = f"{images.dtype} {images.shape}"
            raise ValueError(f"{path.name}: images must be uint8 (N, 32, 32, 3), not {found}")
        integers = labels.ndim == 1 and labels.dtype.kind in "iu"
        if not integers or labels.min() < 0 or labels.max() >= NUM_CLASSES:
            raise ValueError(f"{path.name}: labels must be integers (N,) from 0 to {NUM_CLASSES - 1}")
        if path.exists():
            raise DataError(f"{path} exists already. Move it away first.")
    _check_space(files)
    started = time.monotonic()
    try:
        _run_child(files, stall_s)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in files)
    say(f"FFCV wrote {sizes} in {time.monotonic() - started:.1f} s")


def _check_space(files: Files) -> None:
    needed: dict[Path, int] = {}
    for path, (_, labels) in files.items():
        needed[path.parent] = needed.get(path.parent, 0) + Layout(len(labels)).size_bytes
    for folder, num_bytes in needed.items():
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise DataError(
                f"{folder} has {free / 1e6:.1f} MB free, the data needs {num_bytes / 1e6:.1f} MB.\n"
                f"Free some space, or choose another folder with --data.dir."
            )


def _run_child(files: Files, stall_s: float) -> None:
    """Run `ffcv_child` on arrays handed over in memory; its output, tqdm and tracebacks, goes to a file."""
    jobs = json.dumps([(str(path.absolute()), len(labels)) for path, (_, labels) in files.items()])
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with os.fdopen(os.memfd_create("cifar_dist"), "wb") as content, tempfile.TemporaryFile() as output:
        for images, labels in files.values():
            content.write(np.ascontiguousarray(images).data)
            content.write(labels.astype(np.int64).data)
        content.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", "cifar_dist.data.ffcv_child", str(content.fileno()), jobs],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=env,
            pass_fds=[content.fileno()], start_new_session=True,
        )  # fmt: skip
        try:
            stalled = _watch(child, list(files), stall_s)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        if child.returncode == 0:
            return
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if stalled:
        reason = f"the writer made no progress for {stall_s:g} s and was killed"
    elif child.returncode < 0:
        reason = f"the writer died of signal {-child.returncode} ({signal.strsignal(-child.returncode)})"
    else:
        reason = lines[-1] if lines else f"the writer ended with exit code {child.returncode}"
    names = " and ".join(str(path) for path in files)
    raise DataError(
        f"{names} could not be written: {reason}.\nNothing was left behind; remove the cause and run again."
    )


def _watch(child: subprocess.Popen[bytes], paths: list[Path], stall_s: float) -> bool:
    """Wait for the child's end; True as soon as its files have not grown for `stall_s` seconds."""
    written, since = -1, time.monotonic()
    while True:
        try:
            child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            now = sum(path.stat().st_size for path in paths if path.exists())
            if now != written:
                written, since = now, time.monotonic()
            elif time.monotonic() - since > stall_s:
                return True
        else:
            return False
