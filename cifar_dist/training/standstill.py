"""Which rank holds up a run that stands still, from what the ranks last said of themselves; and the report of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from cifar_dist.training.beats import Beat

_MAX_LINES = 12  # of one message, so that it fits a screen


def at_fault(seen: Mapping[int, Beat], silent_s: Mapping[int, float], timeout_s: float) -> list[int] | None:
    """The ranks for which the others wait; empty if every one waits for the others; None if all is well.

    All is well while a rank that the others may wait for is heard of, and is where it may be for so long.

    Args:
        seen: the newest beat of each rank.
        silent_s: how long ago it came.
        timeout_s: how long a rank may be silent, or at one place.
    """
    present = {rank: beat for rank, beat in seen.items() if not beat.left}
    silent = [rank for rank in present if silent_s[rank] >= timeout_s]
    if silent:
        return silent
    works = {rank: beat for rank, beat in present.items() if not beat.waits}
    stuck = [rank for rank, beat in works.items() if beat.idle_s >= max(timeout_s, beat.limit_s)]
    if works:
        return stuck or None
    if any(beat.idle_s < timeout_s for beat in present.values()):
        return None
    first = min(beat.step for beat in present.values())
    behind = [rank for rank, beat in present.items() if beat.step == first]
    return behind if len(behind) < len(present) else []


def describe(
    seen: Mapping[int, Beat],
    silent_s: Mapping[int, float],
    faulty: Sequence[int],
    timeout_s: int,
    store_s: float = 0.0,
) -> str:
    """The report, at most a screen: who is at fault first, then where each rank is, and what to do.

    Args:
        store_s: for how long the store by which the ranks hear of each other has not answered.
    """
    alone = len(seen) == 1
    unknown = alone or (store_s >= timeout_s and not faulty)
    blamed = "" if unknown else f"; at fault: {_ranks(faulty)}" if faulty else "; every rank waits for the others"
    lines = [f"the run stands still: no progress for {timeout_s} s{blamed}."]
    if store_s >= timeout_s:
        lines.append(f"The ranks have not heard of each other for {store_s:.0f} s: {_store()} does not answer.")
    order = [*faulty, *(rank for rank in seen if rank not in faulty)]
    shown = order if len(order) <= _MAX_LINES else order[: _MAX_LINES - 1]
    lines += [f"  {_line(rank, seen[rank], silent_s[rank], timeout_s, store_s >= timeout_s)}" for rank in shown]
    if len(shown) < len(order):
        lines.append(f"  and {len(order) - len(shown)} more ranks")
    lines.append(_advice([seen[rank] for rank in faulty], alone))
    lines.append(f"run.stall_timeout_s {timeout_s} is how long a run may stand still; 0 turns this off.")
    return "\n".join(lines)


def store_holder() -> int | None:
    """The rank whose process holds the store; None: torchrun's own on the first machine."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def _store() -> str:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    holder = store_holder()
    return f"their store, in {'torchrun' if holder is None else 'rank 0'}'s process at {address},"


def where(rank: int, beat: Beat) -> str:
    """Which process that rank is, and where it was when it was last heard of."""
    if not beat.number:
        return f"rank {rank}: was never heard of"
    doing = "waits for the others: " if beat.waits else ""
    source = f" ({beat.source})" if beat.source else ""
    at = f"step {beat.step}, " if beat.step else ""
    return f"rank {rank} (host {beat.host}, pid {beat.pid}): {at}{doing}{beat.what}{source}"


def _line(rank: int, beat: Beat, silent_s: float, timeout_s: float, old: bool) -> str:
    text = where(rank, beat)
    if silent_s >= timeout_s:
        stopped = ", stopped by a signal" if beat.process_state() in ("T", "t") else ""
        return f"{text}; no sign of life since, for {silent_s:.0f} s{stopped}"
    if beat.left:
        return f"{text}; has done its part"
    heard = "" if old or silent_s < 3 else f", last heard of {silent_s:.0f} s ago"
    return f"{text}; there for {beat.idle_s:.0f} s{heard}"


def _advice(faulty: Sequence[Beat], alone: bool) -> str:
    again = "Then go on from the last checkpoint by the same command with --run.resume auto."
    if alone:
        return f"See where it hangs: the disk, the device, or this program. {again}"
    if not faulty:
        return f"The network between them, or a device, may hang. {again}"
    hosts = ", ".join(dict.fromkeys(beat.host for beat in faulty))
    return f"See what is wrong on {hosts}: the process, the disk, the device or the network. {again}"


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
