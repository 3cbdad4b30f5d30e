"""What only a GPU can show, each as a program of its own; launch/measure runs them.

    python -m tests.support.real_gpu augment DEVICE       the augmentation on it, eager and compiled, against a CPU's
    python -m tests.support.real_gpu waits TRAIN.BETON    CUDA raises an error at each wait except at log steps
    python -m tests.support.real_gpu equal DEVICE         one process with two micro-batches, and two on the same device
    python -m tests.support.real_gpu killed FOLDER SETTINGS...    a run, and the same killed half-way and resumed
    python -m tests.support.real_gpu profile DEVICE SETTINGS...   the longest operations of three steps, and memory

DEVICE is cuda or cpu; SETTINGS are those of cifar_dist.train. A step right behind a log step is not watched for waits,
since validations and checkpoints come before it.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cifar_dist import cli
from cifar_dist.config import AugmentConfig, Config, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.distributed import World, init_distributed
from cifar_dist.process import kill_process_tree
from cifar_dist.training.metrics import Metrics, Window
from cifar_dist.training.precision import Precision, choose_precision, compile_for_training, set_backends
from cifar_dist.training.schedule import Step
from cifar_dist.training.summary import sha256_of_parameters
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
GPU = replace(ALONE, device=torch.device("cuda", 0))
SAMPLES = Split(train=np.arange(100), validation=np.arange(200, 250))  # 8 steps an epoch
SMALL = Config(
    model=ModelConfig(stem="whiten", width=0.0625),
    train=TrainConfig(
        batch_size=12, micro_batch_size=12, precision="bf16", compile="off", log_every_steps=5, max_steps=10,
        checkpoint_every_steps=6,
    ),
    eval=EvalConfig(every_epochs=1, batch_size=20, bn_samples=40, tta="none"),
)  # fmt: skip
ALL_PARTS = OptimConfig(name="muon", grad_clip=1.0, ema_decay=0.9, norm_scales="fixed")
CONFIGS = {
    "muon": SMALL,
    "sgd, fp16": replace(SMALL, train=replace(SMALL.train, precision="fp16"), optim=OptimConfig(name="sgd")),
    "sgd, clipping, fp16": replace(
        SMALL, train=replace(SMALL.train, precision="fp16"), optim=OptimConfig(name="sgd", grad_clip=1.0)
    ),
    "all parts": replace(
        SMALL,
        model=ModelConfig(stem="pooled", width=0.0625, dropout=0.2, auxiliary=True, merge_1x1="on"),
        train=replace(SMALL.train, batch_size=24),
        optim=ALL_PARTS,
        augment=AugmentConfig(flip="random", cutout=8),
    ),
    "inception_v2": replace(SMALL, model=ModelConfig(name="inception_v2", width=0.0625, stem="strided")),
}


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


def random_batch(num: int, device: torch.device) -> Batch:
    """The same images, labels and indices on every device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels, indices = torch.randint(0, 10, (num,), generator=generator), torch.arange(num)
    return Batch(*(x.to(device) for x in (images, labels, indices)))


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
    all_steps = random_batch(NUM_STEPS * BATCH_SIZE, device)
    metrics, per_rank, size_of_micro_batch = Metrics(world), BATCH_SIZE // size, EQUAL.train.micro_batch_size
    for number in range(NUM_STEPS):
        first = number * BATCH_SIZE + rank * per_rank
        parts = [slice(k, k + size_of_micro_batch) for k in range(first, first + per_rank, size_of_micro_batch)]
        batches = [Batch(all_steps.images[p], all_steps.labels[p], all_steps.indices[p]) for p in parts]
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


def compare_augmentation(device: torch.device) -> None:
    """Random words and receipts are equal; pixels differ from float64 on a CPU by rounding.

    Raises:
        AssertionError: they differ by more.
    """
    config, batch, on_cpu = AugmentConfig(), random_batch(5_000, device), random_batch(5_000, ALONE.device)
    functions = {"eager": augment.augment_batch, "compiled": compile_for_training(augment.augment_batch)}
    keys = augment.epoch_keys(1, 3)
    words = augment.random_words(on_cpu.indices, keys[:4].view(2, 2))
    assert torch.equal(augment.random_words(batch.indices, keys[:4].view(2, 2).to(device)).cpu(), words)
    for size in (None, 24):
        exact, receipt = augment.augment_batch(on_cpu.images, on_cpu.indices, keys, config, torch.float64, size)
        for name, function in functions.items():
            images, found = function(batch.images, batch.indices, keys.to(device), config, torch.float32, size)
            error = (images.cpu().double() - exact).abs().max().item()
            print(f"{name}, {size or 32} pixels: largest difference {error:.1e}")
            assert error < 1e-5
            assert torch.equal(found.cpu(), receipt)


def compare_killed_run(folder: Path, settings: list[str]) -> None:
    """Train with `settings`, and again, killed (kill -9) at a checkpoint and resumed.

    Raises:
        AssertionError: the two ended with different models.
    """
    shutil.rmtree(folder, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the run gets it, too; this process waits until that has saved

    def start(name: str, *more: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "cifar_dist.train", *settings, "--run.dir", str(folder / name), *more]
        return subprocess.Popen(words)

    def digest(name: str) -> str:
        return str(json.loads((folder / name / "summary.json").read_text())["model_sha256"])

    assert start("whole").wait() == 0
    process = start("killed")
    while not list((folder / "killed/checkpoints").glob("step-*.pt")) and process.poll() is None:
        time.sleep(0.1)
    kill_process_tree(process.pid)
    assert not (folder / "killed/summary.json").exists(), "the run ended before it was killed"
    assert start("killed", "--run.resume", "auto").wait() == 0
    print(digest("whole"), digest("killed"))
    assert digest("whole") == digest("killed")


def profile(device: torch.device, settings: list[str]) -> None:
    """Print the longest operations of three training steps, the memory that they take at most, and their time."""
    config = cli.load_config(settings)
    set_backends(config.train, config.run.deterministic, device)
    world = replace(ALONE, device=device)
    train_step = TrainStep(config, world, choose_precision(config.train.precision, device))
    train_step.prepare()
    metrics, batch = Metrics(world), random_batch(config.train.micro_batch_size, device)

    def step(number: int) -> None:
        train_step.run(Step(number, 1.0), iter([(0, batch)] * train_step.accumulation), metrics)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(3):
        step(number)
    synchronize()
    started = time.perf_counter()
    for number in range(3, 8):
        step(number)
    synchronize()
    print(f"a step takes {1e3 * (time.perf_counter() - started) / 5:.1f} ms")
    with torch.profiler.profile() as profiler:
        for number in range(8, 11):
            step(number)
        synchronize()
    key = f"self_{device.type}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=90))
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in ("augment", "waits", "equal", "killed", "profile"):
        sys.exit(__doc__)
    what, first, *settings = sys.argv[1:]
    if what == "waits":
        let_windows_wait()
        with init_distributed("cuda"):
            for name, config in CONFIGS.items():
                print(name, flush=True)
                train(config, Path(first))
    elif what == "equal":
        one, again, two = digests(1, first), digests(1, first), digests(2, first)
        print(one, again, two)
        sys.exit(0 if len(one | again | two) == 1 else 1)
    elif what == "augment":
        compare_augmentation(torch.device(first))
    elif what == "killed":
        compare_killed_run(Path(first), settings)
    else:
        profile(torch.device(first), settings)


if __name__ == "__main__":
    main()
