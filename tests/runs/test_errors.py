"""Mistakes and damage end with one screen that says what to do, a documented exit code, and nothing changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cifar_dist import errors
from tests.support import runs

pytestmark = pytest.mark.run


def one_screen(output: str) -> bool:
    return "Traceback" not in output and len(output.splitlines()) <= 30


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unknown_key_names_the_closest() -> None:
    output = runs.run(1, "--optim.lrr", "0.1", expected=2)
    assert "error: there is no option --optim.lrr. Did you mean --optim.lr?" in output
    assert one_screen(output)


@pytest.mark.parametrize("content", [b"optim: {lrr: 1}", b"optim: [", b"\xff\xfe\x00", b"- 1\n"])
def test_unreadable_config(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my config.yaml"
    path.write_bytes(content)
    output = runs.run(1, "--config", path, expected=2)
    assert str(path) in output
    assert one_screen(output)
    assert path.read_bytes() == content


def test_missing_config() -> None:
    output = runs.run(1, "--config", "configs/nothing.yaml", expected=2)
    assert "configs/nothing.yaml" in output
    assert one_screen(output)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_size_that_does_not_divide(world_size: int, tmp_path: Path) -> None:
    sizes = ("--train.batch_size", "100", "--train.micro_batch_size", "16")
    # torchrun's own exit code is 1 whatever its workers return.
    output = runs.run(world_size, *sizes, "--run.dir", tmp_path / "run", expected=2 if world_size == 1 else 1)
    assert f"train.batch_size 96 or {112 if world_size == 1 else 128}" in output
    assert output.count("error: train.batch_size 100") == 1
    assert not (tmp_path / "run").exists()


def test_world_size_that_does_not_divide(tmp_path: Path) -> None:
    sizes = ("--train.batch_size", "64", "--train.micro_batch_size", "32")
    output = runs.run(3, *sizes, "--run.dir", tmp_path / "run", expected=1)
    assert output.count("error: train.batch_size 64 is no multiple of train.micro_batch_size 32 x 3 processes") == 1
    assert "2 or 1 processes" in output or "1 or 2 processes" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.data
@pytest.mark.parametrize("keep", [-1, 10_000_000])
def test_truncated_beton(keep: int, data_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "data folder"
    shutil.copytree(data_dir, damaged, ignore=shutil.ignore_patterns(".*"))
    path = damaged / "train.beton"
    os.truncate(path, path.stat().st_size + keep if keep < 0 else keep)
    before = digests(damaged)
    output = runs.run(1, "--data.dir", damaged, "--run.dir", tmp_path / "run", expected=3)
    assert str(path) in output
    assert "cifar_dist.prepare" in output
    assert one_screen(output)
    assert digests(damaged) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: taking the network away needs root")
def test_missing_data_without_network(tmp_path: Path) -> None:
    command = [
        "unshare",
        "-n",
        *runs.command(1),
        "--data.dir",
        str(tmp_path / "data"),
        "--run.dir",
        str(tmp_path / "r"),
    ]
    result = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 3
    assert "--data.source" in output
    assert one_screen(output)
    assert [path.name for path in (tmp_path / "data").rglob("*.beton")] == []


@pytest.mark.data
def test_file_without_a_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"not a checkpoint")
    output = runs.run(1, "--checkpoint", path, "--data_dir", data_dir, module="evaluate", expected=4)
    assert str(path) in output
    assert one_screen(output)


def test_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "step-00000001.pt", tmp_path / "proof"
    script = (
        "import os, sys, torch\n"
        "class Trap:\n"
        "    def __reduce__(self): return os.system, (f'touch {sys.argv[2]}',)\n"
        "torch.save({'format': 2, 'step': 1, 'model': Trap(), 'config': ''}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(proof)], check=True)
    output = runs.run(1, "--checkpoint", path, module="evaluate", expected=4)
    assert "holds other objects than tensors, numbers and strings, so it was not loaded" in output
    assert not proof.exists()


def test_summary_of_codes_is_what_the_package_uses() -> None:
    assert [(kind.__name__, kind.exit_code) for kind in errors.KINDS] == [
        ("UserError", 2),
        ("DataError", 3),
        ("CheckpointError", 4),
        ("NonFiniteError", 5),
        ("PeerError", 6),
        ("RunInUseError", 7),
        ("DivergedError", 8),
    ]


@pytest.mark.parametrize(
    ("code", "node", "told"),
    [(1, None, True), (6, "", True), (6, "0", True), (6, "1", False), *((code, "0", False) for code in (0, 2, 5, 75))],
)
def test_the_machine_is_suspected_once(
    code: int, node: str | None, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After codes that may come from it; under srun, whose output has those of all nodes, on the first."""
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    if node is not None:
        monkeypatch.setenv("SLURM_PROCID", node)
    errors.suggest_doctor(code)
    assert capsys.readouterr().err == f"`{sys.executable} -m cifar_dist.doctor` checks this machine.\n" * told


def test_mistakes_under_torchrun_are_told_once() -> None:
    """Whichever rank fails first, torchrun stops the others; rank 0 alone says why."""
    output = runs.run(4, "--optim.lrr", "0.1", expected=1)
    assert output.count("error: there is no option --optim.lrr.") == 1


@pytest.mark.parametrize(("rank", "said", "waits"), [("0", "error: nonsense\n", []), ("3", "", [3])])
def test_rank_0_prints_before_torchrun_stops_it(
    rank: str, said: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops every process as soon as one of them has ended, so the others end 3 s later."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(errors, "_shutting_down", threading.Event())
    monkeypatch.setattr(errors, "_exit_within", lambda *_: None)  # or pytest itself exits 6 s later
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as end, errors.exit_on_error(on_all_ranks=True):
        raise errors.UserError("nonsense")
    assert end.value.code == 2
    assert capsys.readouterr().err == said
    assert waited == waits
