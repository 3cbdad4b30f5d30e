"""Which rank stalls the run or is lost, by the heartbeats of all ranks, the message, and who may write it down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cifar_dist.distributed import World
from cifar_dist.fault_tolerance import heartbeat, run_lock, watchdog
from cifar_dist.fault_tolerance.heartbeat import FailureNotice, Heartbeat, HeartbeatThread, identity
from cifar_dist.fault_tolerance.stall_report import describe, find_stalled_ranks, stall_notice
from cifar_dist.phase import Phase, current, in_phase, process_age_s, set_phase, started_ticks, waiting

WAITS = Heartbeat(number=9, step=17, phase=Phase("the gradient exchange", waits=True), idle_s=6, host="n1", pid=1)
READS = replace(WAITS, phase=Phase("reading data"))
SAVES = replace(WAITS, phase=Phase("writing the checkpoint", limit_s=540))
TIMEOUT_S = 5


def silent(heartbeat: Heartbeat, seconds: float = 5) -> Heartbeat:
    return replace(heartbeat, silent_s=seconds)


def finished(heartbeat: Heartbeat) -> Heartbeat:
    return replace(heartbeat, finished=True)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([WAITS, READS], [1]),
        ([WAITS, READS, READS], [1, 2]),
        ([WAITS, replace(READS, idle_s=4)], None),  # it moved a moment ago
        ([WAITS, SAVES], None),
        ([WAITS, replace(SAVES, idle_s=541)], [1]),
        ([WAITS, silent(WAITS)], [1]),
        ([WAITS, silent(SAVES)], [1]),  # a slow disk is no excuse for silence
        ([silent(WAITS), READS], [0]),
        ([WAITS, WAITS], []),
        ([WAITS, replace(WAITS, step=16)], [1]),
        ([WAITS, replace(WAITS, idle_s=1)], None),
        ([SAVES, finished(silent(READS, 9))], None),
        ([WAITS, silent(Heartbeat())], [1]),
        ([READS], [0]),
        ([SAVES], None),
    ],
)
def test_stalled_ranks(beats: list[Heartbeat], expected: list[int] | None) -> None:
    assert find_stalled_ranks(dict(enumerate(beats)), TIMEOUT_S) == expected


@pytest.mark.parametrize(
    ("beats", "reporter", "killed"),
    [
        ([WAITS, READS], 0, []),
        ([silent(WAITS), READS], 1, [0]),
        ([finished(WAITS), WAITS, READS], 1, []),
        ([finished(silent(WAITS)), silent(WAITS), READS], 2, [1]),
    ],
)
def test_a_rank_that_has_finished_neither_reports_nor_is_killed(
    beats: list[Heartbeat], reporter: int, killed: list[int]
) -> None:
    notice = stall_notice(dict(enumerate(beats)), TIMEOUT_S, store_s=0, own_rank=0)
    assert notice is not None
    assert (notice.reporter, notice.silent) == (reporter, killed)


def test_without_a_store_the_lowest_rank_that_runs_here_reports() -> None:
    here = replace(WAITS, **{name: getattr(identity(), name) for name in ("host", "pid", "started")})
    seen = dict(enumerate([silent(here, 6), WAITS, finished(here), here, here]))
    notice = stall_notice(seen, TIMEOUT_S, store_s=6, own_rank=3)
    assert notice is not None
    assert (notice.reporter, notice.silent) == (3, [0])
    assert "No heartbeats for 6 s: the store, in rank 0's process at " in notice.text
    of_rank_0 = stall_notice(seen, TIMEOUT_S, store_s=6, own_rank=0)
    assert of_rank_0 is not None
    assert of_rank_0.silent == []  # it does not kill itself, but exits with its code


def test_report_names_the_stalled_rank_first() -> None:
    text = describe({0: WAITS, 1: replace(READS, host="n2", pid=2, silent_s=4)}, [1], TIMEOUT_S)
    first, second, third, *_ = text.splitlines()
    assert "stalled: rank 1" in first
    assert second.strip() == "rank 1 (host n2, pid 2): step 17, reading data; for 6 s, last heartbeat 4 s ago"
    assert "rank 0 (host n1, pid 1): step 17, waits for other ranks: the gradient exchange" in third
    assert "--run.resume auto" in text


def test_report_fits_a_screen() -> None:
    seen = dict.fromkeys(range(256), silent(WAITS, 9))
    text = describe(seen, list(seen)[100:], TIMEOUT_S, store_s=9.0)
    assert len(text.splitlines()) <= 20
    assert "and 245 more ranks" in text
    assert "does not answer" in text


@pytest.mark.parametrize("owned", [True, False])
def test_only_a_run_that_owns_its_directory_writes_its_status(
    owned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 reports that rank 0 was suspended; by then another run may own the directory."""
    watch = watchdog.Watchdog(World(1, 2, 1, 2, torch.device("cpu")), TIMEOUT_S)
    watch.directory = tmp_path
    watch._heartbeats.seen[0] = identity() if owned else replace(identity(), pid=1)
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "begin_shutdown", lambda: None)
    monkeypatch.setattr(watchdog, "_EXIT_DELAY_S", 0)
    monkeypatch.setattr(os, "_exit", codes.append)
    lock = run_lock.acquire(tmp_path, False, print)
    watch._abort(FailureNotice("PeerError", "the run is stalled", True, reporter=1))
    lock.release()
    assert codes == [6]
    path = tmp_path / "status.json"
    assert path.exists() == owned
    assert not owned or json.loads(path.read_text())["status"] == "failed"


def test_phases() -> None:
    reads = Phase("reading data", limit_s=9)
    set_phase(reads)
    with waiting():
        assert current.phase == Phase("reading data", waits=True)
        with in_phase(Phase("other")):
            assert current.phase.name == "other"
        assert current.phase.waits
    assert current.phase == reads
    before = current.began
    set_phase(reads)
    assert current.began > before  # for the watchdog, which counts the seconds since


def test_a_process_is_known_by_id_and_start_time() -> None:
    child = subprocess.Popen(["sleep", "100"])
    ticks = started_ticks(child.pid)
    assert ticks is not None
    beat = replace(identity(), pid=child.pid, started=ticks)
    assert beat.process_state() == "running"
    assert replace(beat, started=ticks - 1).process_state() == "ended"  # an earlier process with that id
    child.kill()
    deadline = time.monotonic() + 10
    while beat.process_state() != "ended":  # a zombie
        assert time.monotonic() < deadline
    child.wait()
    assert beat.process_state() == "ended"
    assert 0 < process_age_s() < 24 * 3600


def test_kill_checks_the_start_time() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = replace(identity(), pid=process.pid, started=0)
        born.kill()
        assert born.process_state() == "ended"
        true = replace(born, started=started_ticks(process.pid))
        elsewhere = replace(true, host="another")
        elsewhere.kill()
        assert elsewhere.process_state() == "elsewhere"
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while true.process_state() != "suspended":
            assert time.monotonic() < deadline
        true.kill()
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert identity().process_state() == "running"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def beat_of(process: subprocess.Popen[bytes]) -> Heartbeat:
    return replace(identity(), number=1, pid=process.pid, started=started_ticks(process.pid))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"number": 0}, False),  # nothing was heard of that rank yet
        ({"finished": True}, False),  # it has left the run
        ({"host": "another"}, False),
        ({"namespace": "of another container"}, False),
        ({"started": 0}, True),  # another process has its id
    ],
)
@pytest.mark.parametrize("reaped", [False, True])
def test_ranks_whose_process_has_ended(
    reaped: bool, change: dict[str, Any], expected: bool, child: subprocess.Popen[bytes]
) -> None:
    beat = replace(beat_of(child), **change)
    for number in (signal.SIGCONT, signal.SIGSTOP):  # running, suspended
        child.send_signal(number)
        assert beat.has_ended() == ("started" in change)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))  # without: a zombie
    assert beat.has_ended() == expected


@pytest.mark.parametrize(
    ("of_rank_2", "quick", "expected"),
    [
        ({}, True, [2]),
        ({"host": "another"}, False, [2]),  # known only by its missing heartbeats
        ({"namespace": "of another container"}, False, [2]),
        ({"finished": True}, False, [1, 2]),  # both have left
    ],
)
def test_a_process_that_has_ended_is_lost_at_once(
    of_rank_2: dict[str, Any], quick: bool, expected: list[int], child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rank 1 has left the run, rank 2 is killed."""
    limit_s = 30.0 if quick else 0.8
    monkeypatch.setattr(heartbeat, "_LOST_S", limit_s)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.1)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    beats = [replace(identity(), number=1), finished(beat_of(child)), replace(beat_of(child), **of_rank_2)]
    threads = [
        HeartbeatThread(World(rank, 3, rank, 3, torch.device("cpu"), store=store), lambda beat=beat: beat)  # type: ignore[misc]
        for rank, beat in enumerate(beats)
    ]
    for thread, beat in zip(threads[1:], beats[1:], strict=True):
        thread._send(beat.finished)
    child.kill()
    child.wait()
    threads[0].start()
    started = time.monotonic()
    assert threads[0].find_lost_ranks() == expected
    assert (time.monotonic() - started < min(5, limit_s)) == quick
    threads[0].close()


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("second_notices", [True, False])
def test_one_rank_of_a_node_prints_that_another_is_lost(
    first: int, second_notices: bool, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rank 1 is killed. The second of the others notices that, too, or receives the notice of the first."""
    codes = list[int]()
    monkeypatch.setattr(watchdog, "begin_shutdown", lambda: None)
    monkeypatch.setattr(watchdog, "_EXIT_DELAY_S", 0)
    monkeypatch.setattr(os, "_exit", codes.append)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    worlds = [World(rank, 3, rank, 3, torch.device("cpu"), store=store) for rank in range(3)]
    HeartbeatThread(worlds[1], lambda: beat_of(child))._send(finished=False)
    child.kill()
    child.wait()
    watches = {rank: watchdog.Watchdog(worlds[rank], 300) for rank in (first, 2 - first)}
    for watch in watches.values():
        watch._heartbeats.start()
    while not all(heartbeat.number for watch in watches.values() for heartbeat in watch._heartbeats.seen.values()):
        time.sleep(0.05)
    for watch in watches.values():
        if watch.world.rank == first or second_notices:
            watch._abort_without("its process has ended")
        else:
            notice = watch._heartbeats.notice
            while notice is None:
                time.sleep(0.05)
                notice = watch._heartbeats.notice
            watch._abort(notice)
        watch._heartbeats.notice = None  # of this process only, which continues
        time.sleep(0.2)  # until the notice is in the store
    assert codes == [6, 6]
    assert capfd.readouterr().err.count("error: rank ") == 1
    for watch in watches.values():
        watch._heartbeats.close()
