"""Faults in the middle of a training, planted in one rank of real processes (see `faulty`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cifar_dist.training.checkpoint import all_steps
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.xdist_group("clock")]
OPTIONS = (*runs.SMALL, "--train.precision", "fp32", "--train.checkpoint_every_steps", "4", "--train.batch_size", "48",
           "--train.micro_batch_size", "8", "--train.log_every_steps", "2", "--train.max_steps", "24",
           "--run.stall_timeout_s", "5")  # fmt: skip


def start(fault: str, world_size: int, run_dir: Path, *options: str | Path) -> subprocess.Popen[str]:
    """`world_size` ranks as launch/node starts them, with `fault`."""
    command = [*runs.ON_ONE_CPU, sys.executable]
    if world_size > 1:
        command = [
            sys.executable,
            "-m",
            "cifar_dist.cluster.launcher",
            "--standalone",
            "--nproc-per-node",
            str(world_size),
        ]
    return runs.start_command([*command, runs.FAULTY, fault, *OPTIONS, "--run.dir", str(run_dir), *map(str, options)])


def status(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return values


def said(output: str) -> str:
    """The one message of the run, with all its lines but torchrun's and the launcher's."""
    assert len(re.findall(r"error: (?!rank \d was killed)", output)) == 1, output
    lines = output[output.index("error: ") :].splitlines()
    return "\n".join(line for line in lines if "elastic" not in line and "was killed by" not in line)


def check_end(run_dir: Path, code: int, message: str, last_step: int | None) -> None:
    found = status(run_dir)
    assert (found["status"], found["exit_code"], found["last_checkpoint_step"]) == ("failed", code, last_step)
    assert found["message"] in message
    assert runs.children_with(str(run_dir)) == []
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_rank(rank: int, data_dir: Path, tmp_path: Path) -> None:
    """Rank 0 holds the store, by which the others hear of each other."""
    process = start(f"stop:{rank}:10", 2, tmp_path, "--data.dir", data_dir)
    runs.wait_until((tmp_path / "checkpoints/step-00000008.pt").exists, process)
    started = time.monotonic()
    output = runs.finish(process, expected=6, timeout_s=40)
    assert time.monotonic() - started < 5 + 15
    message = said(output)
    assert f"stalled: rank {rank}" in message
    first, other = (line for line in message.splitlines() if line.startswith("  rank"))
    assert re.search(rf"rank {rank} \(host \S+, pid \d+\): .*no heartbeat for .*suspended by a signal", first)
    assert re.search(rf"rank {1 - rank} .*: step 1\d, waits for other ranks: the gradient exchange", other)
    check_end(tmp_path, 6, message, 8)


@pytest.mark.slow
def test_rank_that_hangs_in_reading(data_dir: Path, tmp_path: Path) -> None:
    """Under torchrun itself, whose store is shared."""
    command = [*runs.command(2)[:-2], runs.FAULTY, "hang_reading:1:10", *OPTIONS, "--data.dir", str(data_dir)]
    process = runs.start_command([*command, "--run.dir", str(tmp_path)])
    message = said(runs.finish(process, expected=1, timeout_s=60))
    assert "stalled: rank 1" in message
    assert re.search(r"rank 1 .*: step 10, reading data \(\S+\); for \d+ s", message)
    assert re.search(r"rank 0 .*: step 10, waits for other ranks: the gradient exchange", message)
    check_end(tmp_path, 6, message, 8)


@pytest.mark.slow
def test_one_process_that_hangs(data_dir: Path, tmp_path: Path) -> None:
    message = said(runs.finish(start("hang_reading:0:10", 1, tmp_path, "--data.dir", data_dir), expected=6))
    assert re.search(r"rank 0 .*: step 10, reading data", message)
    check_end(tmp_path, 6, message, 8)


@pytest.mark.slow
def test_slow_runs_are_not_stalled(data_dir: Path, tmp_path: Path) -> None:
    """All ranks stopped and continued, and checkpoints that take twice the timeout."""
    process = start("slow_disk:0:22", 2, tmp_path, "--data.dir", data_dir)
    runs.wait_until((tmp_path / "checkpoints/step-00000008.pt").exists, process)
    ranks = runs.workers_of(process, tmp_path)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, number)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    output = runs.finish(process)
    assert "is stalled" not in output
    assert status(tmp_path)["status"] == "done"


@pytest.mark.slow
def test_a_person_in_the_debugger_is_not_interrupted(data_dir: Path, tmp_path: Path) -> None:
    command = [*runs.ON_ONE_CPU, sys.executable, runs.FAULTY, "debugger:0:10", *OPTIONS, "--run.dir", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--data.dir", str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=runs.REPOSITORY,
    )  # fmt: skip
    runs.wait_until((tmp_path / "checkpoints/step-00000008.pt").exists, process)
    time.sleep(9)
    assert process.poll() is None
    process.kill()
    output, _ = process.communicate(timeout=10)
    assert "(Pdb)" in output
    assert "is stalled" not in output


GONE_S = 20.0  # for all ranks, from the moment of the fault; some 6 s where no other test runs


@pytest.mark.parametrize(
    ("fault", "last_step"),
    [
        ("lose_behind_kernel", 8),
        pytest.param("lose_behind_device", 8, marks=pytest.mark.slow),
        ("lose_in_evaluation", 12),
    ],
)
def test_lost_rank_while_the_others_wait_for_their_devices(
    fault: str, last_step: int, data_dir: Path, tmp_path: Path
) -> None:
    """As on GPUs, where a collective never ends for a lost rank. One rank prints the message."""
    options = ("--train.max_steps", "12", "--run.stall_timeout_s", "300", "--data.dir", data_dir)
    process = start(f"{fault}:all:10", 3, tmp_path, *options)
    runs.wait_until(lambda: len(runs.workers_of(process, tmp_path)) == 3, process)
    runs.wait_until(lambda: len(runs.workers_of(process, tmp_path)) == 2, process)
    started = time.monotonic()
    runs.wait_until(lambda: not runs.workers_of(process, tmp_path), process)
    assert time.monotonic() - started < GONE_S
    message = said(runs.finish(process, expected=6))
    assert "lost contact with rank 1 on " in message
    check_end(tmp_path, 6, message, last_step)


def test_error_of_a_rank_whose_loader_never_closes(data_dir: Path, tmp_path: Path) -> None:
    """The message comes before the loader is closed, and no rank waits for that."""
    options = ("--run.stall_timeout_s", "300", "--data.dir", data_dir)
    process = start("fail_and_never_close:all:10", 2, tmp_path, *options)
    runs.wait_until((tmp_path / "checkpoints/step-00000008.pt").exists, process)
    started = time.monotonic()
    runs.wait_until(lambda: not runs.workers_of(process, tmp_path), process)
    assert time.monotonic() - started < GONE_S + 2  # two more steps
    output = runs.finish(process, expected=1)
    assert "\n[rank1]: RuntimeError: a mistake in the program\n" in output  # below the traceback
    message = said(output)
    assert "rank 1 failed: RuntimeError: a mistake in the program" in message
    check_end(tmp_path, 6, message, 8)


def test_out_of_memory_while_the_others_wait_for_their_devices(data_dir: Path, tmp_path: Path) -> None:
    process = start("no_gpu_memory:all:10", 3, tmp_path, "--run.stall_timeout_s", "300", "--data.dir", data_dir)
    runs.wait_until((tmp_path / "checkpoints/step-00000008.pt").exists, process)
    started = time.monotonic()
    runs.wait_until(lambda: not runs.workers_of(process, tmp_path), process)
    assert time.monotonic() - started < GONE_S + 2  # two more steps
    message = said(runs.finish(process, expected=2))
    assert "rank 1 ran out of memory in step 10" in message
    check_end(tmp_path, 2, message, 8)


def test_nan_on_one_rank(data_dir: Path, tmp_path: Path) -> None:
    options = ("--train.log_every_steps", "12", "--train.checkpoint_every_steps", "12", "--data.dir", data_dir)
    message = said(runs.finish(start("nan_loss:1:15", 2, tmp_path, *options), expected=5))
    assert "the loss became infinite or NaN in step 15 on rank 1 of 2;" in message
    check_end(tmp_path, 5, message, 12)


@pytest.mark.parametrize(
    "kind",
    ["large", pytest.param("nan", marks=pytest.mark.slow), pytest.param("infinite", marks=pytest.mark.slow)],
)
def test_unusable_gradient_on_one_rank(kind: str, data_dir: Path, tmp_path: Path) -> None:
    """Losses are finite until then. It is noticed at the next log step, and nothing is saved in between."""
    options = ("--train.log_every_steps", "12", "--train.checkpoint_every_steps", "12", "--data.dir", data_dir)
    message = said(runs.finish(start(f"{kind}_gradient:1:15", 3, tmp_path, *options), expected=5))
    assert "the gradient became infinite, NaN or too large to be summed in step 15 on rank 1 of 3;" in message
    check_end(tmp_path, 5, message, 12)


def test_drifted_rank(data_dir: Path, tmp_path: Path) -> None:
    """Found before it is saved; three ranks can tell which of them it is."""
    options = ("--optim.ema_decay", "0.99", "--data.dir", data_dir)
    output = runs.finish(start("flip_bit:1:11", 3, tmp_path, *options), expected=8)
    message = said(output)
    (name,) = re.findall(r"planted in (\S+)", output)
    assert "do not hold the same model after step 12, so it is not saved" in message
    assert f"tensors that differ: {name}. rank 1 on " in message
    assert "differs from the other ranks" in message
    check_end(tmp_path, 8, message, 8)
    assert all_steps(tmp_path / "checkpoints") == [4, 8]


@pytest.mark.slow
def test_ranks_are_compared_between_checkpoints(data_dir: Path, tmp_path: Path) -> None:
    options = ("--train.checkpoint_every_steps", "0", "--train.check_ranks_every_steps", "7", "--data.dir", data_dir)
    message = said(runs.finish(start("flip_bit:0:3", 2, tmp_path, *options), expected=8))
    assert "after step 8, so it is not saved" in message  # the first log step from the seventh on
    assert "all suspect" in message
    check_end(tmp_path, 8, message, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "parts"),
    [
        ("no_memory:1:3", 2, ("rank 1 ran out of memory in step 3", "train.micro_batch_size is 1920",
                              "--train.micro_batch_size 960")),
        ("no_memory_to_score:1:3", 2,
         ("rank 1 ran out of memory in step 4", "(evaluation, batch 1 of ", "--eval.batch_size 2500")),
        ("fail:1:3", 1, ("rank 1 failed: RuntimeError: a mistake in the program", "logs/")),
    ],
)  # fmt: skip
def test_the_error_of_one_rank_is_that_of_all(
    fault: str, code: int, parts: tuple[str, ...], data_dir: Path, tmp_path: Path
) -> None:
    options = ("--train.batch_size", "3840", "--train.micro_batch_size", "1920", "--train.max_steps", "4",
               "--data.subset", "3840", "--eval.batch_size", "5000", "--eval.test_subset", "None",
               "--run.stall_timeout_s", "60",  # passes of many images take seconds
               "--data.dir", data_dir, "--train.checkpoint_every_steps", "2")  # fmt: skip
    output = runs.finish(start(fault, 2, tmp_path, *options), expected=code)
    message = said(output)
    assert all(part in message for part in parts)
    assert "lost contact" not in message
    assert ("Traceback" in output) == (code == 1)
    check_end(tmp_path, 6 if code == 1 else 2, message, 4 if "score" in fault else 2)
