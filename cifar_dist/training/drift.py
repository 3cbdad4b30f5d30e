"""Whether all ranks hold the same model, to the bit: a checksum of each tensor, compared over the ranks.

Each rank computes its own updates from the same gradients, so nothing brings one back whose memory, device or code
once gave another number.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cifar_dist.distributed import World, all_gather
from cifar_dist.errors import DivergedError, shared

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """A checksum of the bits of each tensor: (N,) int64, on their device.

    Bits count as integers, weighted by their place, so that swapped elements show; a difference of one element always
    does, and NaN is a number like any other. Sums wrap around, so their order is of no matter.

    Args:
        tensors: of any number format, in logical order whatever their order in memory; not empty.
    """
    result = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    by_size = defaultdict(list)
    for k, tensor in enumerate(tensors):
        by_size[tensor.element_size()].append(k)
    for size, members in by_size.items():
        bits = torch.cat([tensors[k].detach().reshape(-1).view(_BITS[size]) for k in members]).long()
        # Odd factors lose no bit, and the ends of the tensors cut one sum into one for each.
        bits *= 2 * torch.arange(len(bits), device=bits.device) + 1
        ends = torch.tensor([tensors[k].numel() for k in members]).cumsum(0).to(bits.device)
        sums = torch.cat((bits.new_zeros(1), bits.cumsum(0)))[torch.cat((ends.new_zeros(1), ends))].diff()
        result[torch.tensor(members, device=result.device)] = sums
    return result


def refuse_drift(tensors: Mapping[str, Tensor], world: World, step: int, last_saved: int | None) -> None:
    """Compare `tensors`, by name, over all ranks; waits for the device. One rank alone has nothing to compare.

    Raises:
        DivergedError: on every rank; they are not equal after `step`.
    """
    if world.size == 1:
        return
    by_device = defaultdict(list)
    for name, tensor in tensors.items():
        by_device[tensor.device].append(name)
    order = [name for names in by_device.values() for name in names]
    sums = torch.cat([checksums([tensors[name] for name in names]).cpu() for names in by_device.values()])
    table = all_gather(sums, world)
    differ = set((table != table[0]).any(dim=0).nonzero().flatten().tolist())
    if differ:
        places = sorted(differ, key=lambda k: list(tensors).index(order[k]))
        hosts = _hosts(world)
        raise shared(DivergedError(_report(table, places, order, hosts, step, last_saved)))


def _report(
    table: Tensor, places: Sequence[int], names: Sequence[str], hosts: Sequence[str], step: int, last_saved: int | None
) -> str:
    odd = odd_ranks(table[:, places[0]].tolist())
    suspects = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in (odd or range(len(hosts)))[:8])
    who = f"{suspects} differ{'s' * (len(odd) == 1)} from the other ranks" if odd else f"{suspects}: all suspect"
    good = "There is no good checkpoint yet"
    if last_saved is not None:
        good = f"The last good checkpoint is that of step {last_saved}, from which --run.resume auto goes on"
    return (
        f"the {len(hosts)} processes do not hold the same model after step {step}, so it is not saved.\n"
        f"First of {len(places)} tensors that differ: {names[places[0]]}. {who}.\n"
        f"{good}.\n"
        f"A device or its memory is faulty, the machines are not alike (processors, versions), or code computes\n"
        f"something else on each rank. Try without what is suspect."
    )


def odd_ranks(sums: Sequence[int]) -> list[int] | None:
    """The ranks whose sum is not that of the majority; None if no sum has more than half of them."""
    (value, count), *_ = Counter(sums).most_common(1)
    return [rank for rank, own in enumerate(sums) if own != value] if 2 * count > len(sums) else None


def _hosts(world: World) -> list[str]:
    name = socket.gethostname().encode()[:64].ljust(64)
    rows = all_gather(torch.frombuffer(bytearray(name), dtype=torch.uint8), world)
    return [row.numpy().tobytes().decode(errors="replace").rstrip() for row in rows]
