"""Errors of the computation, explained: values that are not finite, ranks with different models, no memory left."""

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cifar_dist.config import Config
from cifar_dist.distributed import World, all_gather, all_gather_text
from cifar_dist.errors import DataError, DivergedError, NonFiniteError, UserError
from cifar_dist.phase import current

# Of torch, the system (errno ENOMEM, as when the dataset is mapped), CUDA, cuBLAS, C++, and cuDNN, which finds no
# algorithm where there is no room for its workspace.
_OUT_OF_MEMORY = (
    "allocate memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc",
    "Unable to find a valid cuDNN algorithm", "unable to find an engine", "CUDNN_STATUS_INTERNAL_ERROR",
)  # fmt: skip


def nonfinite_step(
    what: str, step: int, ranks: Sequence[int], world_size: int, last_saved: int | None
) -> NonFiniteError:
    """The error, the same on every rank, for a loss or gradient that was not finite in `step` on `ranks`."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {world_size}"
    if len(ranks) == world_size:
        names = f"all {world_size} ranks"
    where = f" on {names}" if world_size > 1 else ""
    how = "infinite, NaN or too large to be summed" if what == "gradient" else "infinite or NaN"
    return _nonfinite(f"the {what} became {how} in step {step}{where}; nothing was saved since.", last_saved)


def refuse_nonfinite(tensors: Mapping[str, Tensor], step: int, last_saved: int | None) -> None:
    """Check all `tensors` of the state, by name; waits for the device.

    Raises:
        NonFiniteError: a value is infinite or NaN.
    """
    device = next(iter(tensors.values())).device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in tensors.values()])
    if not bool(finite.all()):
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise _nonfinite(f"{name} is infinite or NaN after step {step}, so it is not saved.", last_saved)


def _nonfinite(what: str, last_saved: int | None) -> NonFiniteError:
    advice = "Lower optim.lr, set optim.grad_clip, or see where it starts with --debug.anomaly True."
    return NonFiniteError(f"{what} {_last_good(last_saved)}. {advice}", printed_elsewhere=True)


def _last_good(step: int | None) -> str:
    return "There is no good checkpoint yet" if step is None else f"The last good checkpoint is that of step {step}"


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
    """XOR of the elements of each tensor as 64-bit patterns, (N,) int64 on the CPU; waits for the device.

    Swapped elements, and two elements with the same bit flipped, do not show.
    """
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
    sums = table[:, different[0]]
    odd = (sums != sums.mode().values).nonzero().flatten().tolist()
    if 2 * len(odd) >= len(hosts):  # without a majority, any rank may be the faulty one
        odd = []
    suspects = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in (odd or range(len(hosts)))[:8])
    who = f"{suspects} differ{'s' * (len(odd) == 1)} from the other ranks" if odd else f"{suspects}: all suspect"
    resume = "" if last_saved is None else ", from which --run.resume auto resumes"
    raise DivergedError(
        f"the {len(hosts)} processes do not hold the same model after step {step}, so it is not saved.\n"
        f"First of {len(different)} tensors that differ: {list(tensors)[different[0]]}. {who}.\n"
        f"{_last_good(last_saved)}{resume}.\n"
        f"A device or its memory is faulty, the nodes differ (processors, versions), or code computes something else\n"
        f"on each rank. Try without the suspect nodes or devices.",
        printed_elsewhere=True,
    )


@contextmanager
def explain_out_of_memory(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Convert the out-of-memory errors of torch, CUDA, numpy and the system.

    Raises:
        UserError: this rank is out of memory; with the setting to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error  # a DataError may come from FFCV's thread
        if not isinstance(cause, MemoryError) and not any(text in str(cause) for text in _OUT_OF_MEMORY):
            raise
        detail = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        where = f"in step {current.step}" if current.step else "before the first step"
        text = f"rank {rank} ran out of memory {where} ({current.phase.name}): {detail}\n"
        raise UserError(text + advice(config, current.phase.memory_setting, world_size)) from error


def advice(config: Config, setting: str, world_size: int) -> str:
    """Which setting to lower, from which value, and to which."""
    if setting != "train.micro_batch_size":
        value = config.eval.batch_size if setting == "eval.batch_size" else config.eval.bn_samples
        again = "With --run.resume auto the run resumes from the last checkpoint."
        return f"{setting} is {value}; lower it, e.g. --{setting} {max(2, value // 2)}. {again}"
    value, batch_size = config.train.micro_batch_size, config.train.batch_size
    per_rank, processes = batch_size // world_size, f"{world_size} process{'es' * (world_size > 1)}"
    lower = next((size for size in range(value - 1, 1, -1) if per_rank % size == 0), None)
    if lower is None:
        return (
            f"{setting} is {value}, and no lower one is possible with train.batch_size {batch_size} on {processes}. "
            f"Lower model.width, or give another train.batch_size and --run.name."
        )
    return (
        f"{setting} is {value}; the next lower one for train.batch_size {batch_size} on {processes} is {lower}: "
        f"--{setting} {lower}\n"
        f"Batch norm then sees fewer samples at a time, which makes it another run: give another --run.name, too."
    )
