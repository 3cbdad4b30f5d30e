"""Which rank stalls the run, by the heartbeats of all ranks, and the message about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cifar_dist.fault_tolerance.heartbeat import Heartbeat, identity
from cifar_dist.fault_tolerance.stall_report import describe, find_stalled_ranks
from cifar_dist.phase import Phase, current, in_phase, set_phase, waiting

WAITS = Heartbeat(number=9, step=17, phase="the gradient exchange", waits=True, idle_s=6, host="n1", pid=1)
READS = replace(WAITS, phase="reading data", waits=False)
SAVES = replace(READS, phase="writing the checkpoint", limit_s=540)
TIMEOUT_S = 5


@pytest.mark.parametrize(
    ("beats", "silent_s", "expected"),
    [
        ([WAITS, READS], [0, 0], [1]),
        ([WAITS, READS, READS], [0, 0, 0], [1, 2]),
        ([WAITS, replace(READS, idle_s=4)], [0, 0], None),  # it moved a moment ago
        ([WAITS, SAVES], [0, 0], None),
        ([WAITS, replace(SAVES, idle_s=541)], [0, 0], [1]),
        ([WAITS, WAITS], [0, 5], [1]),
        ([WAITS, SAVES], [0, 5], [1]),  # a slow disk is no excuse for silence
        ([WAITS, READS], [5, 0], [0]),
        ([WAITS, WAITS], [0, 0], []),
        ([WAITS, replace(WAITS, step=16)], [0, 0], [1]),
        ([WAITS, replace(WAITS, idle_s=1)], [0, 0], None),
        ([SAVES, replace(READS, finished=True)], [0, 9], None),
        ([WAITS, Heartbeat()], [0, 5], [1]),
        ([READS], [0], [0]),
        ([SAVES], [0], None),
    ],
)
def test_stalled_ranks(beats: list[Heartbeat], silent_s: list[float], expected: list[int] | None) -> None:
    assert find_stalled_ranks(dict(enumerate(beats)), dict(enumerate(silent_s)), TIMEOUT_S) == expected


def test_report_names_the_stalled_rank_first() -> None:
    text = describe({0: WAITS, 1: replace(READS, host="n2", pid=2)}, {0: 0.0, 1: 4.0}, [1], TIMEOUT_S)
    first, second, third, *_ = text.splitlines()
    assert "stalled: rank 1" in first
    assert second.strip() == "rank 1 (host n2, pid 2): step 17, reading data; for 6 s, last heartbeat 4 s ago"
    assert "rank 0 (host n1, pid 1): step 17, waits for other ranks: the gradient exchange" in third
    assert "--run.resume auto" in text


def test_report_fits_a_screen() -> None:
    seen = dict.fromkeys(range(256), WAITS)
    text = describe(seen, dict.fromkeys(seen, 9.0), list(seen)[100:], TIMEOUT_S, store_s=9.0)
    assert len(text.splitlines()) <= 20
    assert "and 245 more ranks" in text
    assert "does not answer" in text


def test_phases() -> None:
    before, reads = current.changes, Phase("reading data", limit_s=9)
    set_phase(reads)
    with waiting():
        assert current.phase == Phase("reading data", waits=True)
        with in_phase(Phase("other")):
            assert current.phase.name == "other"
        assert current.phase.waits
    assert current.phase == reads
    assert current.changes == before + 5


def test_only_that_very_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = Heartbeat(**identity() | {"pid": process.pid, "started": 0})
        born.kill()
        assert born.has_ended()
        elsewhere = Heartbeat(**identity() | {"namespace": "another"})
        assert not elsewhere.is_running()
        assert not elsewhere.has_ended()
        os.kill(process.pid, signal.SIGSTOP)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        true = replace(born, started=int(fields[19]))
        deadline = time.monotonic() + 5
        while not true.is_suspended():
            assert time.monotonic() < deadline
        true.kill()
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert Heartbeat(**identity()).is_running()
