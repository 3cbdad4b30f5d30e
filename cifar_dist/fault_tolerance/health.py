"""States in which a run must neither continue nor save: values that are not finite, ranks with different models."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cifar_dist.distributed import World, all_gather, all_gather_text
from cifar_dist.errors import DivergedError, NonFiniteError


def nonfinite_loss(step: int, ranks: Sequence[int], world_size: int, last_saved: int | None) -> NonFiniteError:
    """The error, the same on every rank, for a loss that was infinite or NaN in `step` on `ranks`."""
    if world_size == 1:
        where = ""
    elif len(ranks) == world_size:
        where = f" on all {world_size} ranks"
    else:
        where = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {world_size}"
    return _nonfinite(f"the loss became infinite or NaN in step {step}{where}; nothing was saved since.", last_saved)


def refuse_nonfinite(model: nn.Module, step: int, last_saved: int | None) -> None:
    """Check all parameters; waits for the device.

    Raises:
        NonFiniteError: a parameter is infinite or NaN.
    """
    named = dict(model.named_parameters())
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in named.values()])
    if not bool(finite.all()):
        first = list(named)[int((~finite).nonzero()[0])]
        what = f"a parameter ({first}) is infinite or NaN after step {step}, so it is not saved."
        raise _nonfinite(what, last_saved)


def _nonfinite(what: str, last_saved: int | None) -> NonFiniteError:
    good = "There is no good checkpoint yet"
    if last_saved is not None:
        good = f"The last good checkpoint is that of step {last_saved}"
    advice = "Lower optim.lr, set optim.grad_clip, or see where it starts with --debug.anomaly True."
    return NonFiniteError(f"{what} {good}. {advice}", on_all_ranks=True)


def tensors_of_state(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors, by name, that must be equal on all ranks: model, moving average, optimizer state."""
    tensors = dict(model.state_dict())
    if ema is not None:
        tensors |= {f"moving average of {name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key} of {name}"] = value
    return tensors


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """XOR over the bits of each tensor, (N,) int64 on the CPU; waits for the device. NaN equals NaN."""
    return torch.stack([torch.hash_tensor(tensor.detach()).view(torch.int64).cpu() for tensor in tensors])


def refuse_divergence(tensors: Mapping[str, Tensor], world: World, step: int, last_saved: int | None) -> None:
    """Compare checksums of `tensors`, by name, over all ranks; waits for the device.

    Each rank applies the same gradients to its own copy of the model. A rank that once computed another value (bit
    flip, faulty GPU) therefore stays different.

    Raises:
        DivergedError: on every rank; the tensors differ after `step`.
    """
    if world.size == 1:
        return
    table = all_gather(checksums(tensors.values()), world)
    different = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    if not different:
        return
    hosts = all_gather_text(socket.gethostname(), world)
    odd = odd_ranks(table[:, different[0]].tolist())
    suspects = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in (odd or range(len(hosts)))[:8])
    who = f"{suspects} differ{'s' * (len(odd) == 1)} from the other ranks" if odd else f"{suspects}: all suspect"
    good = "There is no good checkpoint yet"
    if last_saved is not None:
        good = f"The last good checkpoint is that of step {last_saved}, from which --run.resume auto resumes"
    raise DivergedError(
        f"the {len(hosts)} processes do not hold the same model after step {step}, so it is not saved.\n"
        f"First of {len(different)} tensors that differ: {list(tensors)[different[0]]}. {who}.\n"
        f"{good}.\n"
        f"A device or its memory is faulty, the nodes differ (processors, versions), or code computes something else\n"
        f"on each rank. Try without what is suspect.",
        on_all_ranks=True,
    )


def odd_ranks(sums: Sequence[int]) -> list[int] | None:
    """The ranks whose sum differs from that of the majority; None without a majority."""
    (value, count), *_ = Counter(sums).most_common(1)
    return [rank for rank, own in enumerate(sums) if own != value] if 2 * count > len(sums) else None
