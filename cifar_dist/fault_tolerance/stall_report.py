"""From the last heartbeats of all ranks: which rank stalls the run, and the message about it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from cifar_dist.fault_tolerance.heartbeat import Heartbeat

_MAX_LINES = 12  # so that a message fits a screen


def find_stalled_ranks(
    seen: Mapping[int, Heartbeat], silent_s: Mapping[int, float], timeout_s: float
) -> list[int] | None:
    """The ranks for which the others wait; empty if every rank waits; None if the run is not stalled.

    The run is not stalled while some rank computes within its limit, and every rank sends heartbeats.

    Args:
        seen: the newest heartbeat of each rank.
        silent_s: seconds since it arrived.
        timeout_s: seconds that a rank may be silent, or stay in one phase.
    """
    present = {rank: heartbeat for rank, heartbeat in seen.items() if not heartbeat.finished}
    silent = [rank for rank in present if silent_s[rank] >= timeout_s]
    if silent:
        return silent
    computing = {rank: heartbeat for rank, heartbeat in present.items() if not heartbeat.waits}
    stalled = [rank for rank, heartbeat in computing.items() if heartbeat.idle_s >= max(timeout_s, heartbeat.limit_s)]
    if computing:
        return stalled or None
    if any(heartbeat.idle_s < timeout_s for heartbeat in present.values()):
        return None
    first = min(heartbeat.step for heartbeat in present.values())
    behind = [rank for rank, heartbeat in present.items() if heartbeat.step == first]
    return behind if len(behind) < len(present) else []


def describe(
    seen: Mapping[int, Heartbeat],
    silent_s: Mapping[int, float],
    stalled: Sequence[int],
    timeout_s: int,
    store_s: float = 0.0,
) -> str:
    """The message, at most a screen: the stalled ranks first, then the phase of each rank, and what to do.

    Args:
        store_s: seconds since the store last answered.
    """
    alone = len(seen) == 1
    unknown = alone or (store_s >= timeout_s and not stalled)
    blamed = "" if unknown else f"; stalled: {_ranks(stalled)}" if stalled else "; every rank waits for the others"
    lines = [f"the run is stalled: no progress for {timeout_s} s{blamed}."]
    if store_s >= timeout_s:
        lines.append(f"No heartbeats for {store_s:.0f} s: {_store()} does not answer.")
    order = [*stalled, *(rank for rank in seen if rank not in stalled)]
    shown = order if len(order) <= _MAX_LINES else order[: _MAX_LINES - 1]
    lines += [f"  {_line(rank, seen[rank], silent_s[rank], timeout_s, store_s >= timeout_s)}" for rank in shown]
    if len(shown) < len(order):
        lines.append(f"  and {len(order) - len(shown)} more ranks")
    lines.append(_advice([seen[rank] for rank in stalled], alone))
    lines.append(f"run.stall_timeout_s is {timeout_s}; 0 turns this check off.")
    return "\n".join(lines)


def store_host_rank() -> int | None:
    """The rank whose process hosts the store; None if torchrun on the first node does."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def _store() -> str:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    host = store_host_rank()
    return f"the store, in {'torchrun' if host is None else 'rank 0'}'s process at {address},"


def describe_rank(rank: int, heartbeat: Heartbeat) -> str:
    """Which process that rank is, and its last known phase."""
    if not heartbeat.number:
        return f"rank {rank}: no heartbeat yet"
    phase = f"waits for other ranks: {heartbeat.phase}" if heartbeat.waits else heartbeat.phase
    source = f" ({heartbeat.source})" if heartbeat.source else ""
    step = f"step {heartbeat.step}, " if heartbeat.step else ""
    return f"rank {rank} (host {heartbeat.host}, pid {heartbeat.pid}): {step}{phase}{source}"


def _line(rank: int, heartbeat: Heartbeat, silent_s: float, timeout_s: float, outdated: bool) -> str:
    text = describe_rank(rank, heartbeat)
    if silent_s >= timeout_s:
        suspended = ", suspended by a signal" if heartbeat.is_suspended() else ""
        return f"{text}; no heartbeat for {silent_s:.0f} s{suspended}"
    if heartbeat.finished:
        return f"{text}; finished"
    last = "" if outdated or silent_s < 3 else f", last heartbeat {silent_s:.0f} s ago"
    return f"{text}; for {heartbeat.idle_s:.0f} s{last}"


def _advice(stalled: Sequence[Heartbeat], alone: bool) -> str:
    again = "Then resume from the last checkpoint by the same command with --run.resume auto."
    if alone:
        return f"Check the disk, the device, and this program. {again}"
    if not stalled:
        return f"Check the network between the nodes, and the devices. {again}"
    hosts = ", ".join(dict.fromkeys(heartbeat.host for heartbeat in stalled))
    return f"Check the process, the disk, the device and the network on {hosts}. {again}"


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
