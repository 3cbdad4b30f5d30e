"""File systems that lack something, by a library that lets system calls fail (support/failing_calls.c)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_dist.data import cifar10
from tests.support import runs

pytestmark = pytest.mark.skipif(not Path("/usr/bin/cc").exists(), reason="NOT TESTED: file systems (no C compiler)")
SOURCE = runs.REPOSITORY / "tests/support/failing_calls.c"


@pytest.fixture(scope="session")
def library(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def compile_it(folder: Path) -> None:
        words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "failing.so"), str(SOURCE), "-ldl"]
        subprocess.run(words, check=True)

    return made_once("failing-calls", compile_it) / "failing.so"


def failing(library: Path, below: Path, **calls: int) -> dict[str, str]:
    """The environment in which `calls`, such as FLOCK=errno.ENOSYS, fail for files in the folder `below`."""
    numbers = {f"FAIL_{name}": str(number) for name, number in calls.items()}
    return {**os.environ, "LD_PRELOAD": str(library), "FAIL_BELOW": str(below), **numbers}


def python(program: str, env: dict[str, str], expected: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=runs.REPOSITORY, env=env, capture_output=True, text=True,
                          check=False, timeout=60)  # fmt: skip
    assert done.returncode == expected, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("exists", [True, False])
def test_no_locks(number: int, exists: bool, library: Path, tmp_path: Path) -> None:
    """A lease takes their place, also beside the lock file of a machine that has locks."""
    if exists:
        (tmp_path / "lock").touch()
    program = f"""
from pathlib import Path
from cifar_dist.filesystem import lock
first, second = lock(Path({str(tmp_path / "lock")!r})), lock(Path({str(tmp_path / "lock")!r}))
with first:
    try:
        second.acquire(timeout=0)
    except TimeoutError:
        print("excluded")
with second:
    print("free")
"""
    output = python(program, failing(library, tmp_path, FLOCK=number))
    assert output.splitlines()[:2] == ["excluded", "free"]
    assert output.count(f"note: the file system of {tmp_path} has no file locks") == 1


def test_a_lock_that_cannot_be_written_is_an_error(library: Path, tmp_path: Path) -> None:
    program = (
        f"from pathlib import Path; from cifar_dist.filesystem import lock; lock(Path({str(tmp_path / 'lock')!r}))"
    )
    assert "Input/output error" in python(program, failing(library, tmp_path, FLOCK=errno.EIO), expected=1)


WRITE = "from pathlib import Path; from cifar_dist.files import write_text_atomic as w; w(Path({path!r}), 'new')"


@pytest.mark.parametrize(
    "calls",
    [
        *({"FSYNC_DIR": n} for n in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)),
        *({"RENAME": n} for n in (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EEXIST)),
        {"FSYNC_DIR": errno.EINVAL, "RENAME": errno.EBUSY, "LINK": errno.EPERM},
    ],
)
def test_atomic_writing(calls: dict[str, int], library: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.old").write_text("of a killed process")
    output = python(WRITE.format(path=str(path)), failing(library, tmp_path, **calls))
    assert path.read_text() == "new"
    assert output.count("note: the file system of ") == len(calls.keys() - {"LINK"})
    assert {file.name for file in tmp_path.iterdir()} <= {"file", "file.old"}


@pytest.mark.parametrize("calls", [{"FSYNC_DIR": errno.EIO}, {"RENAME": errno.EIO}, {"RENAME": errno.ENOSPC}])
def test_a_failing_disk_is_an_error(calls: dict[str, int], library: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    assert "OSError" in python(WRITE.format(path=str(path)), failing(library, tmp_path, **calls), expected=1)
    assert path.read_text() == ("new" if "FSYNC_DIR" in calls else "old")


def prepare(folder: Path, source: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "cifar_dist.prepare", "--data.dir", str(folder), "--data.source", str(source)]
    return subprocess.Popen(words, cwd=runs.REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


@pytest.mark.data
def test_preparing(library: Path, binary_dir: Path, tmp_path: Path) -> None:
    """Two at a time: the second waits for the first, and uses what it has written."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".prepare.lock").touch()
    calls = {"FLOCK": errno.ENOSYS, "FSYNC_DIR": errno.EOPNOTSUPP, "RENAME": errno.EBUSY, "LINK": errno.EPERM}
    env = failing(library, folder, **calls)
    processes = [prepare(folder, binary_dir, env)]
    while not (folder / ".prepare.lock.lease").exists():
        time.sleep(0.02)
        assert processes[0].poll() is None
    processes.append(prepare(folder, binary_dir, env))
    outputs = [runs.finish(process) for process in processes]
    assert "prepared from" in outputs[0]
    assert "another process is preparing it; waiting" in outputs[1]
    assert "verified" in outputs[1]
    assert all(output.count("has no file locks") == 1 for output in outputs)
    assert all((folder / name).stat().st_size == file.num_bytes for name, file in cifar10.BETON_FILES.items())


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.data
def test_a_run(library: Path, data_dir: Path, tmp_path: Path) -> None:
    """Where all of it is missing, and again, when it finds its results."""
    calls = {"FLOCK": errno.ENOSYS, "FSYNC_DIR": errno.EOPNOTSUPP, "RENAME": errno.EBUSY, "LINK": errno.EPERM}
    words = [*runs.command(1), *runs.SMALL, "--train.max_steps", "4", "--train.checkpoint_every_steps", "2",
             "--run.resume", "auto", "--data.dir", str(data_dir), "--run.dir", str(tmp_path / "run")]  # fmt: skip
    for expected in ("step 4/4", "this run is complete"):
        done = subprocess.run(words, cwd=runs.REPOSITORY, env=failing(library, tmp_path, **calls), check=True,
                              capture_output=True, text=True)  # fmt: skip
        assert expected in done.stdout
        assert done.stderr.count("cannot sync folders") == 1
    assert runs.summary(tmp_path / "run")["steps"] == 4
