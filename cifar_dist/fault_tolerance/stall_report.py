"""Tells from the last heartbeats of all ranks whether the run is stalled and by which rank, and writes the notice."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cifar_dist.fault_tolerance.heartbeat import FailureNotice, Heartbeat

_MAX_LINES = 11  # so that a message fits a screen
Seen = Mapping[int, Heartbeat]
"""The newest heartbeat of each rank."""


def stall_notice(seen: Seen, timeout_s: int, store_s: float, own_rank: int) -> FailureNotice | None:
    """The notice that ends the run; None if it is not stalled.

    Args:
        timeout_s: see `find_stalled_ranks`.
        store_s: seconds since the store last answered.
    """
    store_lost = store_s >= timeout_s
    if store_lost:  # so no heartbeats arrive, for which only the rank that hosts the store is to blame
        host = store_host_rank()
        blamed = host if host != own_rank else None  # this rank sends heartbeats
        seen = {rank: replace(beat, silent_s=store_s if rank == blamed else 0.0) for rank, beat in seen.items()}
    stalled = find_stalled_ranks(seen, timeout_s)
    if stalled is None and not store_lost:
        return None
    silent = silent_ranks(seen, timeout_s)
    reporters = [rank for rank, heartbeat in seen.items() if not heartbeat.finished and rank not in silent]
    if store_lost:
        # The notice cannot be sent: every rank writes its own, and the lowest one that runs on this node prints.
        reporters = [rank for rank in reporters if seen[rank].process_state() == "running"]
    reporter = min(reporters, default=own_rank)
    return FailureNotice("PeerError", describe(seen, stalled or [], timeout_s, store_s), True, reporter, silent)


def silent_ranks(seen: Seen, timeout_s: float) -> list[int]:
    """The ranks that sent no heartbeat for `timeout_s` and have not finished."""
    return [rank for rank, heartbeat in seen.items() if heartbeat.silent_s >= timeout_s and not heartbeat.finished]


def find_stalled_ranks(seen: Seen, timeout_s: float) -> list[int] | None:
    """The ranks for which the others wait; empty if every rank waits; None if the run is not stalled.

    The run is not stalled while some rank computes within its limit, and every rank sends heartbeats.

    Args:
        timeout_s: seconds that a rank may be silent, or stay in one phase.
    """
    silent = silent_ranks(seen, timeout_s)
    if silent:
        return silent
    present = {rank: heartbeat for rank, heartbeat in seen.items() if not heartbeat.finished}
    computing = {rank: heartbeat for rank, heartbeat in present.items() if not heartbeat.phase.waits}
    if computing:
        return [rank for rank, beat in computing.items() if beat.idle_s >= max(timeout_s, beat.phase.limit_s)] or None
    if any(heartbeat.idle_s < timeout_s for heartbeat in present.values()):
        return None
    first = min(heartbeat.step for heartbeat in present.values())
    behind = [rank for rank, heartbeat in present.items() if heartbeat.step == first]
    return behind if len(behind) < len(present) else []


def describe(seen: Seen, stalled: Sequence[int], timeout_s: int, store_s: float = 0.0) -> str:
    """The message, at most a screen: the stalled ranks first, then the phase of each rank, and what to do.

    Args:
        store_s: seconds since the store last answered.
    """
    alone, store_lost = len(seen) == 1, store_s >= timeout_s
    blamed = "" if alone or store_lost else "; every rank waits for the others"
    check = "the disk, the device, and this program" if alone else "the network between the nodes, and the devices"
    if stalled and not alone:
        blamed = f"; stalled: rank{'s' if len(stalled) > 1 else ''} {first_few(list(map(str, stalled)))}"
        hosts = ", ".join(dict.fromkeys(seen[rank].host for rank in stalled))
        check = f"the process, the disk, the device and the network on {hosts}"
    lines = [f"the run is stalled: no progress for {timeout_s} s{blamed}."]
    if store_lost:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        host = "torchrun" if store_host_rank() is None else "rank 0"
        store = f"the store, in {host}'s process at {address},"
        lines.append(f"No heartbeats for {store_s:.0f} s: {store} does not answer.")
    order = [*stalled, *(rank for rank in seen if rank not in stalled)]
    lines += [f"  {_line(rank, seen[rank], timeout_s)}" for rank in order[:_MAX_LINES]]
    if len(order) > _MAX_LINES:
        lines.append(f"  and {len(order) - _MAX_LINES} more ranks")
    lines.append(f"Check {check}. Then resume from the last checkpoint by the same command with --run.resume auto.")
    lines.append(f"run.stall_timeout_s is {timeout_s}; 0 turns this check off.")
    return "\n".join(lines)


def store_host_rank() -> int | None:
    """The rank whose process hosts the store; None if torchrun on the first node does."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def describe_rank(rank: int, heartbeat: Heartbeat) -> str:
    """Which process that rank is, and its last known phase."""
    if not heartbeat.number:
        return f"rank {rank}: no heartbeat yet"
    waits = "waits for other ranks: " if heartbeat.phase.waits else ""
    source = f" ({heartbeat.source})" if heartbeat.source else ""
    step = f"step {heartbeat.step}, " if heartbeat.step else ""
    return f"rank {rank} (host {heartbeat.host}, pid {heartbeat.pid}): {step}{waits}{heartbeat.phase.name}{source}"


def _line(rank: int, heartbeat: Heartbeat, timeout_s: float) -> str:
    text = describe_rank(rank, heartbeat)
    if heartbeat.finished:
        return f"{text}; finished"
    if heartbeat.silent_s >= timeout_s:
        suspended = ", suspended by a signal" if heartbeat.process_state() == "suspended" else ""
        return f"{text}; no heartbeat for {heartbeat.silent_s:.0f} s{suspended}"
    last = "" if heartbeat.silent_s < 3 else f", last heartbeat {heartbeat.silent_s:.0f} s ago"
    return f"{text}; for {heartbeat.idle_s:.0f} s{last}"


def first_few(words: Sequence[str]) -> str:
    """The first eight of `words`, and how many more there are."""
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
