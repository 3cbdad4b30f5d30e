"""cifar_dist.train that measures itself after each validation: `torchrun ... -m tests.support.growing SETTINGS`.

It appends to growth-RANK.jsonl in the run directory, a line per epoch. From epoch `LEAKS_FROM` on everything leaks that
is measured, in turn for each step and each epoch; after epoch `LAST` the run is asked to stop.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from cifar_dist import train
from cifar_dist.data.loader import ReadingThread
from cifar_dist.data.order import Split
from cifar_dist.fault_tolerance import signals
from cifar_dist.training.evaluation import Evaluator, Score
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Trainer

WARM, LEAKS_FROM, LAST = 2, 8, 11  # epochs, from 1: six without leaks to compare, four with them
LEAK_BYTES = 1_000_000
KEPT: list[Any] = []


class Mallinfo(ctypes.Structure):
    """malloc's figures, see mallinfo(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = Mallinfo
LIBC.malloc.restype, LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


class Kept:
    """An object that is never released."""


def leak_in_step() -> None:
    KEPT.append(torch.zeros(100))


def leak_in_epoch() -> None:
    pages = mmap.mmap(-1, 8 * LEAK_BYTES)  # malloc may have room for what leaks without asking for more
    pages.write(bytes(len(pages)))
    KEPT.extend([Kept(), pages, Path(os.devnull).open(), bytes(LEAK_BYTES)])  # noqa: SIM115
    LIBC.malloc(LEAK_BYTES)
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def measure(epoch: int) -> dict[str, Any]:
    """What this process holds, by name: numbers of things, and bytes; of objects those made since epoch 1."""
    tracemalloc.start()  # not before, as it would slow the imports and FFCV's compiler; later calls do nothing
    while any(isinstance(thread, ReadingThread) for thread in threading.enumerate()):  # the last one ends by itself
        time.sleep(0.01)
    gc.collect()
    if epoch == 1:
        gc.freeze()  # half a million objects of the imports, which need not be counted each time
    objects = gc.get_objects()
    tensors = [each for each in objects if isinstance(each, torch.Tensor)]
    types = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in objects)
    memory = LIBC.mallinfo2()
    status = Path("/proc/self/status").read_text()
    return {
        "epoch": epoch,
        "tensors": len(tensors),
        "tensor bytes": sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()),
        "Python bytes": tracemalloc.get_traced_memory()[0],
        "malloc bytes": memory.uordblks + memory.hblkhd,
        "Python threads": threading.active_count(),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "resident bytes": 1024 * int(status.split("VmRSS:")[1].split()[0]),
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "objects": types,
    }


def plant() -> None:
    create, step, score = Trainer.__init__, TrainStep.run, Evaluator.score

    def create_less(self: Trainer, *arguments: Any) -> None:
        create(self, *arguments)
        trainers.append(self)
        # A few of the images to score: what stays behind does not depend on how many they were.
        self.split = Split(self.split.train, self.split.validation[::40])

    def leaking_step(self: TrainStep, *arguments: Any) -> None:
        step(self, *arguments)
        if arguments[0].number >= (LEAKS_FROM - 1) * steps_per_epoch[0]:
            leak_in_step()

    def measured_score(evaluator: Evaluator, *arguments: Any) -> Score:
        result = score(evaluator, *arguments)
        self = trainers[0]
        steps_per_epoch[0] = self.order.steps_per_epoch
        epoch = self.progress.step // self.order.steps_per_epoch
        if epoch >= LEAKS_FROM:
            leak_in_epoch()
        with (self.directory.parent / f"growth-{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(measure(epoch)) + "\n")
        if epoch == LAST:
            signals.request()
        return result

    steps_per_epoch, trainers = [2**62], list[Trainer]()
    Trainer.__init__, Evaluator.score = create_less, measured_score  # type: ignore[method-assign, assignment]
    TrainStep.run = leaking_step  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plant()
    train.main()
