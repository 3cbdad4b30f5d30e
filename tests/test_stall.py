"""Which rank is at fault, by what the ranks said of themselves, and how the report reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cifar_dist.place import Place, at, go, here, waiting
from cifar_dist.training.beats import Beat, identity
from cifar_dist.training.standstill import at_fault, describe

WAITS = Beat(number=9, step=17, what="the gradient exchange", waits=True, idle_s=6, host="n1", pid=1)
READS = replace(WAITS, what="reading data", waits=False)
SAVES = replace(READS, what="writing the checkpoint", limit_s=540)
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
        ([SAVES, replace(READS, left=True)], [0, 9], None),
        ([WAITS, Beat()], [0, 5], [1]),
        ([READS], [0], [0]),
        ([SAVES], [0], None),
    ],
)
def test_at_fault(beats: list[Beat], silent_s: list[float], expected: list[int] | None) -> None:
    assert at_fault(dict(enumerate(beats)), dict(enumerate(silent_s)), TIMEOUT_S) == expected


def test_report_names_the_one_at_fault_first() -> None:
    text = describe({0: WAITS, 1: replace(READS, host="n2", pid=2)}, {0: 0.0, 1: 4.0}, [1], TIMEOUT_S)
    first, second, third, *_ = text.splitlines()
    assert "at fault: rank 1" in first
    assert second.strip() == "rank 1 (host n2, pid 2): step 17, reading data; there for 6 s, last heard of 4 s ago"
    assert "rank 0 (host n1, pid 1): step 17, waits for the others: the gradient exchange" in third
    assert "--run.resume auto" in text


def test_report_fits_a_screen() -> None:
    seen = dict.fromkeys(range(256), WAITS)
    text = describe(seen, dict.fromkeys(seen, 9.0), list(seen)[100:], TIMEOUT_S, store_s=9.0)
    assert len(text.splitlines()) <= 20
    assert "and 245 more ranks" in text
    assert "does not answer" in text


def test_places() -> None:
    before, reads = here.moves, Place("reading data", limit_s=9)
    go(reads)
    with waiting():
        assert here.place == Place("reading data", waits=True)
        with at(Place("other")):
            assert here.place.what == "other"
        assert here.place.waits
    assert here.place == reads
    assert here.moves == before + 5


def test_only_that_very_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = Beat(**identity() | {"pid": process.pid, "born": 0})
        born.kill()
        assert born.process_state() == ""
        elsewhere = Beat(**identity() | {"machine": "another"})
        assert elsewhere.process_state() == ""
        os.kill(process.pid, signal.SIGSTOP)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        true = replace(born, born=int(fields[19]))
        deadline = time.monotonic() + 5
        while true.process_state() != "T":
            assert time.monotonic() < deadline
        true.kill()
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert Beat(**identity()).process_state() == "R"
