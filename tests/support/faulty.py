"""cifar_dist.train with a fault planted in one rank: `torchrun ... tests/support/faulty.py KIND:RANK:STEP SETTINGS`.

STEP counts from 1; with a RANK of "all" every rank has it. The kinds are the functions of `FAULTS`.
"""

from __future__ import annotations

import ctypes
import os
import pdb  # noqa: T100 - one of the faults
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cifar_dist import train
from cifar_dist.data import loader
from cifar_dist.training import checkpoint, evaluation
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.train_step import TrainStep

HOARD: list[torch.Tensor] = []


def hang_reading(_: TrainStep, batches: Iterator[Any]) -> Iterator[Any]:
    """The next batch never comes."""

    def hanging() -> Iterator[Any]:
        time.sleep(3600)
        yield from batches

    return hanging()


def stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def flip_bit(train_step: Any, *_: Any) -> None:
    """One bit of one weight of the last layer; not the lowest, which the rounding of the next steps may swallow."""
    name, parameter = [item for item in train_step.model.named_parameters() if item[0].endswith("weight")][-1]
    with torch.no_grad():
        bits = parameter.view(torch.int64 if parameter.dtype == torch.float64 else torch.int32)
        bits[3, 1] ^= 2**18
    print(f"planted in {name}", flush=True)


def nan_loss(train_step: Any, *_: Any) -> None:
    """In the next forward pass only."""

    def spoil(*arguments: Any) -> torch.Tensor:
        handle.remove()
        spoiled: torch.Tensor = arguments[2] * float("nan")
        return spoiled

    handle = train_step.model.classifier.register_forward_hook(spoil)


def spoil_gradient(train_step: Any, value: float) -> None:
    """One element, in the next backward pass only."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        spoiled = gradient.clone()
        spoiled[1000] = value
        return spoiled

    handle = train_step._network.flat.register_hook(spoil)


def nan_gradient(train_step: Any, *_: Any) -> None:
    spoil_gradient(train_step, float("nan"))


def infinite_gradient(train_step: Any, *_: Any) -> None:
    spoil_gradient(train_step, float("-inf"))


def large_gradient(train_step: Any, *_: Any) -> None:
    """Beyond the range of the exact sum."""
    spoil_gradient(train_step, 1e6)


def no_memory(*_: Any) -> None:
    """From now on this process has some 16 MB more, and no more: what it had freed and kept is taken.

    Tensors have to be larger, so that what does not fit is the first of them, and megabytes stay free at any time: a
    thread ends the process where it finds no room for its thread-local data.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 12 * 2**20, resource.RLIM_INFINITY))
    for megabytes in (64, 8):
        with suppress(RuntimeError):
            while True:
                HOARD.append(torch.empty(megabytes * 2**20, dtype=torch.uint8))
    resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, resource.RLIM_INFINITY))


def no_memory_to_score(*_: Any) -> None:
    """The same, where an evaluation has its first images."""
    module: Any = evaluation
    good = module.normalize

    def bad(*arguments: Any) -> Any:
        no_memory()
        return good(*arguments)

    module.normalize = bad


def debugger(*_: Any) -> None:
    pdb.Pdb(nosigint=True).set_trace()


def fail(*_: Any) -> None:
    raise RuntimeError("a mistake in the program")


def wait_for_device(*_: Any) -> None:
    """Without end, as in a call of CUDA: no signal interrupts it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).sleep(3600)


def kill_rank_1(train_step: Any) -> None:
    """The others do not notice in the exchange: with NCCL only the stream waits, and without end."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    train_step._exact_sum._several_ranks = False


def lose_behind_kernel(train_step: Any, *_: Any) -> None:
    """Rank 1 is killed, and FFCV's threads of the others wait for a kernel on their devices."""
    kill_rank_1(train_step)
    module: Any = loader.ReadingThread
    module.run_pipeline = wait_for_device


def lose_behind_device(train_step: Any, *_: Any) -> None:
    """Rank 1 is killed, and the training threads of the others wait for their devices where they read metrics."""
    kill_rank_1(train_step)
    module: Any = Metrics
    module.window = wait_for_device


def lose_in_evaluation(*_: Any) -> None:
    """Rank 1 is killed in an evaluation, and the training threads of the others wait for their devices there."""
    evaluator: Any = evaluation.Evaluator
    good = evaluator._count

    def bad(*arguments: Any) -> None:
        good(*arguments)
        dist.barrier()
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_device()

    evaluator._count = bad


def fail_and_never_close(*_: Any) -> None:
    """Rank 1 fails, and no loader's thread ever ends."""
    module: Any = loader
    module.end_reading = wait_for_device
    if os.environ["RANK"] == "1":
        fail()


def no_gpu_memory(train_step: Any, *_: Any) -> None:
    """Rank 1 runs out of memory, and the training threads of the others wait for their devices."""
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    train_step._exact_sum.finish = wait_for_device


def slow_disk(*_: Any) -> None:
    """Writing a checkpoint takes ten seconds more."""
    module: Any = checkpoint
    good = module.write

    def slow(*arguments: Any) -> Path:
        time.sleep(10)
        result: Path = good(*arguments)
        return result

    module.write = slow


_FUNCTIONS = (
    hang_reading, stop, debugger, flip_bit, nan_loss, nan_gradient, infinite_gradient, large_gradient, no_memory,
    no_memory_to_score, fail, lose_behind_kernel, lose_behind_device, lose_in_evaluation, fail_and_never_close,
    no_gpu_memory, slow_disk,
)  # fmt: skip
FAULTS: dict[str, Callable[..., Iterator[Any] | None]] = {function.__name__: function for function in _FUNCTIONS}


def plant(kind: str, rank: str, number: int) -> None:
    good = TrainStep.run

    def step(self: TrainStep, step: Any, batches: Iterator[Any], metrics: Any) -> None:
        if step.number + 1 == number and rank in ("all", os.environ.get("RANK", "0")):
            batches = FAULTS[kind](self, batches) or batches
        good(self, step, batches, metrics)

    TrainStep.run = step  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, number = sys.argv.pop(1).split(":")
    plant(kind, rank, int(number))
    train.main()
