"""launch/prove, as it is and with a rank that computes something else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(900)]
PLACE = "        gradient = bucket.buffer()\n"
# One element of rank 1's gradients, by one unit in the last place.
PLANTED = PLACE + (
    "        if dist.is_initialized() and dist.get_rank() == 1:\n"
    "            gradient[7] = torch.nextafter(gradient[7], torch.ones_like(gradient[7]))\n"
)


def copy_of_repository(folder: Path, data_dir: Path) -> Path:
    listing = subprocess.run(["git", "ls-files"], cwd=runs.REPOSITORY, capture_output=True, text=True, check=True)
    for name in listing.stdout.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(runs.REPOSITORY / name, target)
    (folder / ".venv").symlink_to(runs.REPOSITORY / ".venv")
    (folder / "data").symlink_to(data_dir)
    return folder


def prove(folder: Path, expected: int) -> str:
    done = subprocess.run(["./launch/prove"], cwd=folder, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def test_every_number_of_processes_gives_one_model(data_dir: Path, tmp_path: Path) -> None:
    folder = copy_of_repository(tmp_path / "copy", data_dir)
    output = prove(folder, expected=0)
    assert output.count("EQUAL") == 3
    assert "DIFFERENT" not in output
    log = (folder / "runs/prove/3-killed-then-2.log").read_text()
    assert "Signal 9 (SIGKILL)" in log
    assert "resuming from" in log
    digests = {runs.summary(folder / "runs/prove" / name)["model_sha256"] for name in ("1", "2", "3")}
    assert len(digests) == 1


def test_a_rank_that_computes_something_else_is_found(data_dir: Path, tmp_path: Path) -> None:
    folder = copy_of_repository(tmp_path / "copy", data_dir)
    module = folder / "cifar_dist/training/exact_sum.py"
    text = module.read_text()
    assert text.count(PLACE) == 1
    module.write_text(text.replace(PLACE, PLANTED))
    output = prove(folder, expected=1)
    assert "runs/prove/1 and runs/prove/2: DIFFERENT" in output
    assert "metrics: from step" in output or "parameters: in the checkpoints of step 6" in output
