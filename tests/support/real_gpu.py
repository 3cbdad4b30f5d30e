"""What only a GPU can show, each as a program of its own.

    python -m tests.support.real_gpu waits TRAIN.BETON    CUDA raises an error at each wait except at log steps
    python -m tests.support.real_gpu equal cuda           one process with two micro-batches, and two on the same GPU

A step right behind a log step is not watched for waits, since validations and checkpoints come before it.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from cifar_dist.config import Config, ModelConfig, OptimConfig, TrainConfig
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.distributed import World, init_distributed
from cifar_dist.training.metrics import Metrics, Window
from cifar_dist.training.precision import Precision, set_backends
from cifar_dist.training.schedule import Step
from cifar_dist.training.summary import sha256_of_parameters
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer
from tests.unit.training.test_device_waits import CONFIGS, GPU, SAMPLES

NUM_STEPS, BATCH_SIZE = 4, 32
EQUAL = Config(
    model=ModelConfig(stem="pooled", width=0.125, dropout=0.1),
    train=TrainConfig(batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE // 2, precision="bf16"),
    optim=OptimConfig(name="muon", grad_clip=1.0),
)


class WaitsAreErrors(Hooks):
    def after_step(self, step: int) -> None:  # noqa: ARG002
        torch.cuda.set_sync_debug_mode("error")


def let_windows_wait() -> None:
    good = Metrics.window

    def window(self: Metrics) -> Window:
        torch.cuda.set_sync_debug_mode("default")
        return good(self)

    Metrics.window = window  # type: ignore[method-assign]


def train(config: Config, path: Path) -> None:
    train_step = TrainStep(config, GPU, Precision(config.train.precision, "cuda"))  # type: ignore[arg-type]
    with BetonLoader(path, GPU.device) as loader, tempfile.TemporaryDirectory() as folder:
        Trainer(config, train_step, SAMPLES, loader, Path(folder), WaitsAreErrors()).train()


def digest_of_rank(rank: int, size: int, device_type: str, store: str) -> str:
    """SHA-256 of the parameters after some steps on random images, as rank `rank` of `size` on one device, by gloo."""
    torch.set_num_threads(1)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)  # type: ignore[attr-defined]
    world = World(rank, size, rank, size, device)
    set_backends(EQUAL.train, True, device)
    train_step = TrainStep(EQUAL, world, Precision("bf16", device_type))
    train_step.prepare()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_STEPS * BATCH_SIZE, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (len(images),), generator=generator)
    metrics, per_rank, size_of_micro_batch = Metrics(world), BATCH_SIZE // size, EQUAL.train.micro_batch_size
    for number in range(NUM_STEPS):
        first = number * BATCH_SIZE + rank * per_rank
        parts = [
            torch.arange(start, start + size_of_micro_batch)
            for start in range(first, first + per_rank, size_of_micro_batch)
        ]
        batches = [Batch(*(x.to(device) for x in (images[p].permute(0, 3, 1, 2), labels[p], p))) for p in parts]
        train_step.run(Step(number, 1.0), iter([(0, batch) for batch in batches]), metrics)
    digest = sha256_of_parameters(train_step.model)
    if size > 1:
        dist.destroy_process_group()
    return digest


def digests(size: int, device_type: str) -> set[str]:
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool,
    ):
        jobs = [pool.submit(digest_of_rank, rank, size, device_type, f"{folder}/store") for rank in range(size)]
        return {job.result() for job in jobs}


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    if what == "waits":
        let_windows_wait()
        with init_distributed("cuda"):
            for name, config in CONFIGS.items():
                print(name, flush=True)
                train(config, Path(argument))
    else:
        one, again, two = digests(1, argument), digests(1, argument), digests(2, argument)
        print(one, again, two)
        sys.exit(0 if len(one | again | two) == 1 else 1)
