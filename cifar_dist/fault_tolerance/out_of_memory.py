"""Turns an out-of-memory error into a message with the setting to lower."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cifar_dist.config import Config
from cifar_dist.errors import DataError, UserError
from cifar_dist.phase import current

_OUT_OF_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc")


@contextmanager
def explain_out_of_memory(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Convert the out-of-memory errors of torch, CUDA, numpy and the system.

    Raises:
        UserError: this rank is out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error  # a DataError may come from FFCV's thread
        refused = isinstance(cause, OSError) and cause.errno == errno.ENOMEM  # as when the dataset is mapped
        if not isinstance(cause, MemoryError) and not refused and not any(s in str(cause) for s in _OUT_OF_MEMORY):
            raise
        detail = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        where = f"in step {current.step}" if current.step else "before the first step"
        text = f"rank {rank} ran out of memory {where} ({current.phase.name}): {detail}\n"
        raise UserError(text + advice(config, current.phase.memory, world_size)) from error


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
