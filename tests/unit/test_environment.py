"""Numbers in environment variables, and the processors that a container's quota leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.environment import cgroup_folders, num_processors, num_threads, number
from cifar_dist.errors import UserError
from tests.support import runs
from tests.support.sizes import MODULES

CPUS = len(os.sched_getaffinity(0))
CPU_V1 = Path("/sys/fs/cgroup/cpu")


@pytest.mark.parametrize(("text", "expected"), [(None, 7), ("", 7), ("  ", 7), ("3", 3), (" 12 ", 12), ("0", 0)])
def test_number(text: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXAMPLE", raising=False)
    if text is not None:
        monkeypatch.setenv("EXAMPLE", text)
    assert number("EXAMPLE", 7) == expected


@pytest.mark.parametrize(
    "text", ["x", "-1", "1.5", "1e3", "0x10", "two", "\N{SUPERSCRIPT TWO}", "1_0", "9" * 30, "4,2"]
)
def test_what_is_no_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE", text)
    with pytest.raises(UserError, match=r"EXAMPLE is .*; valid: a whole number, 0 or more"):
        number("EXAMPLE", 7)


def test_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE", "0")
    with pytest.raises(UserError, match="1 or more"):
        number("EXAMPLE", 7, least=1)


def test_numbers_are_read_in_one_place() -> None:
    """int() of an environment variable ends with a traceback where that is empty."""
    pattern = re.compile(r"int\((os\.)?env(iron)?\b")
    allowed = {"cifar_dist.cluster.restarts": 1}  # TORCH_ELASTIC_SHUTDOWN_TIMEOUT, which the launcher has set
    found = {name: len(pattern.findall(path.read_text())) for name, path in MODULES.items()}
    assert {name: times for name, times in found.items() if times} == allowed


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; valid: a whole number, 1 or more"),
        ({"TORCHELASTIC_MAX_RESTARTS": "-"}, "TORCHELASTIC_MAX_RESTARTS is '-'"),
    ],
)
def test_message(variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "-m", "cifar_dist.train", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables,
                          cwd=runs.REPOSITORY)  # fmt: skip
    assert done.returncode == 2
    assert f"error: the environment variable {message}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.run
@pytest.mark.data
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "", "GROUP_WORLD_SIZE": ""}, ""),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"NUMBA_NUM_THREADS": "1"}, "data.num_workers is 2, but numba cannot start these threads"),
        ({"NUMBA_THREADING_LAYER": "foo"}, "NUMBA_THREADING_LAYER=foo. Change or unset them."),
    ],
)
def test_variables_of_a_run(variables: dict[str, str], message: str, data_dir: Path, tmp_path: Path) -> None:
    """Empty ones, and those of libraries that clash with settings."""
    command = [*runs.command(1), *runs.SMALL, "--train.max_steps", "2", "--data.num_workers", "2"]
    command += ["--data.dir", str(data_dir), "--run.dir", str(tmp_path)]
    command = command[len(runs.ON_ONE_CPU) :]  # two reading threads need two processors
    if CPUS < 2:
        pytest.skip("NOT TESTED: two reading threads (there is one processor)")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables,
                          cwd=runs.REPOSITORY)  # fmt: skip
    assert done.returncode == (2 if message else 0), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def tree(folder: Path, files: dict[str, str], lines: str) -> tuple[Path, Path]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(lines)
    return folder, folder / "own"


V2 = "0::/a/b\n"
V1 = "4:memory:/a\n3:cpu,cpuacct:/docker/x\n0::/\n"


@pytest.mark.parametrize(
    ("files", "lines", "expected"),
    [
        ({"a/b/cpu.max": "100000 100000\n"}, V2, 1),
        ({"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, V2, 1),
        ({"a/b/cpu.max": "50000 100000\n"}, V2, 1),
        ({"a/b/cpu.max": "max 100000\n"}, V2, CPUS),
        ({"a/b/cpu.max": "garbage"}, V2, CPUS),
        ({"a/b/cpu.max": "6400000 100000\n"}, V2, CPUS),
        ({"unified/a/b/cpu.max": "100000 100000\n"}, V2, 1),
        ({"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "9000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "9000"}, V1, 1),
        # In a container the folder of the path is not visible, and the container's own is the root.
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, V1, 1),
        ({"cpu/docker/x/cpu.cfs_quota_us": "-1", "cpu/docker/x/cpu.cfs_period_us": "100000"}, V1, CPUS),
        ({}, V1, CPUS),
        ({}, "", CPUS),
    ],
)  # fmt: skip
def test_quotas(files: dict[str, str], lines: str, expected: int, tmp_path: Path) -> None:
    assert num_processors(*tree(tmp_path, files, lines)) == expected


def test_folders_of_other_limits(tmp_path: Path) -> None:
    cgroups, own = tree(tmp_path, {}, V1)
    expected = ["memory/a", "memory", "", "unified"]  # the last two: of version 2
    assert list(cgroup_folders("memory", cgroups, own)) == [cgroups / name for name in expected]
    assert list(cgroup_folders("pids", cgroups, own)) == [cgroups, cgroups / "unified"]
    assert list(cgroup_folders("pids", cgroups, tmp_path / "absent")) == []


def test_a_real_quota() -> None:
    group = CPU_V1 / f"cifar_dist-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"NOT TESTED: a quota of cgroup v1 ({error.strerror})")
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        program = (
            f"import os; from pathlib import Path; Path('{group}/cgroup.procs').write_text(str(os.getpid()));"
            "from cifar_dist.environment import num_processors; print(num_processors())"
        )
        assert subprocess.check_output([sys.executable, "-c", program], cwd=runs.REPOSITORY, text=True) == "1\n"
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("omp", "torchrun", "expected"),
    [
        (None, False, CPUS), ("1", False, 1), ("1", True, CPUS), ("2", True, min(2, CPUS)), ("1,4", False, 1),
        ("99", False, CPUS), ("0", False, CPUS), ("many", False, CPUS), ("", False, CPUS),
    ],
)  # fmt: skip
def test_threads(omp: str | None, torchrun: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS counts, unless torchrun itself set it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert num_threads(1) == min(expected, num_processors())
