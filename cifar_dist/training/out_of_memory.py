"""Memory that ran out, said as the setting to lower."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cifar_dist.config import Config
from cifar_dist.errors import DataError, UserError
from cifar_dist.place import here

_SIGNS = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc")


@contextmanager
def named(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Turn what torch, CUDA, numpy and the system raise when there is no memory left into what a user can do about it.

    Raises:
        UserError: it ran out, on this rank alone perhaps.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error  # FFCV's thread may be the one without
        refused = isinstance(cause, OSError) and cause.errno == errno.ENOMEM  # as by a mapping of the dataset
        if not isinstance(cause, MemoryError) and not refused and not any(sign in str(cause) for sign in _SIGNS):
            raise
        detail = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        at = f"in step {here.step}" if here.step else "before the first step"
        text = f"rank {rank} ran out of memory {at} ({here.place.what}): {detail}\n"
        raise UserError(text + advice(config, here.place.memory, world_size)) from error


def advice(config: Config, setting: str, world_size: int) -> str:
    """What to lower, from which value, and to which."""
    if setting != "train.micro_batch_size":
        value = config.eval.batch_size if setting == "eval.batch_size" else config.eval.bn_samples
        again = "With --run.resume auto it goes on from the last checkpoint."
        return f"{setting} is {value}; lower it, e.g. --{setting} {max(2, value // 2)}. {again}"
    value, batch_size = config.train.micro_batch_size, config.train.batch_size
    share, processes = batch_size // world_size, f"{world_size} process{'es' * (world_size > 1)}"
    lower = next((size for size in range(value - 1, 1, -1) if share % size == 0), None)
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
