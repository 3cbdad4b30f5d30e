"""The parts of training, one by one, with real tensors and files."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import AugmentConfig, Config, OptimConfig, TrainConfig
from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World
from cifar_dist.errors import CheckpointError
from cifar_dist.models.inception_v1 import inception_v1
from cifar_dist.training import checkpoint, evaluation, optim
from cifar_dist.training.metrics import Metrics, Receipt, Window
from cifar_dist.training.precision import NumberFormat, number_format
from cifar_dist.training.schedule import schedule_of

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
FP32 = NumberFormat("fp32", "cpu")


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = OptimConfig(warmup_share=0.2, warmup_min_steps=0)
    shares = [optim.schedule(step, 100, config) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 20)
    assert shares[19] == shares[20] == max(shares) == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[100] == 0
    cosine = replace(config, schedule="cosine")
    assert optim.schedule(60, 100, cosine) == pytest.approx(0.5)
    assert optim.schedule(40, 100, cosine) == pytest.approx((1 + 2**-0.5) / 2)
    assert optim.schedule(0, 1, replace(config, warmup_share=0)) == 1


def test_short_runs_rise_no_faster_than_long_ones() -> None:
    config = OptimConfig(warmup_share=0.2, warmup_min_steps=50)
    shares = [optim.schedule(step, 20, config) for step in range(20)]
    assert shares[:10] == pytest.approx([(step + 1) / 50 for step in range(10)])
    assert max(shares) < 0.4
    assert shares[-1] == pytest.approx(1 / 16)
    long_run = [optim.schedule(step, 1000, config) for step in range(1000)]
    assert long_run[199] == long_run[200] == 1


def test_peak_learning_rates() -> None:
    layer = nn.Conv2d(3, 4, 3)
    sgd, muon = OptimConfig(name="sgd", lr=0.1), OptimConfig(name="muon", lr=0.1, muon_lr=0.03)
    # SGD's is for a batch of 128, Muon's for any.
    assert [g["peak_lr"] for g in optim.build_optimizer(layer, sgd, 256).param_groups] == [0.2] * 3
    assert [g["peak_lr"] for g in optim.build_optimizer(layer, muon, 256).param_groups] == [0.2, 0.2, 0.2, 0.03]


def test_groups_of_parameters() -> None:
    """No weight decay on norms and biases; the rate of biases is raised; fixed scales are in no group."""
    model = inception_v1(stem="strided", width=0.125)
    config = OptimConfig(name="sgd", lr=0.1, bias_lr_factor=8)
    decayed, scales, biases = optim.build_optimizer(model, config, 128).param_groups
    assert [group["weight_decay"] for group in (decayed, scales, biases)] == [5e-4, 0.0, 0.0]
    assert [group["peak_lr"] for group in (decayed, scales, biases)] == pytest.approx([0.1, 0.1, 0.8])
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(scales["params"]) == len(biases["params"]) - 1 == 55  # one norm per convolution, and the classifier
    assert sum(len(group["params"]) for group in (decayed, scales, biases)) == len(list(model.parameters()))
    optim.fix_norm_scales(model)
    decayed, scales, biases = optim.build_optimizer(model, config, 128).param_groups
    assert scales["params"] == []
    assert len(biases["params"]) == 56


def test_sgd_is_nesterov_as_sutskever_wrote_it() -> None:
    """Three steps on one weight against the recurrence, done by hand."""
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    optimizer = optim.build_optimizer(layer, OptimConfig(name="sgd", momentum=0.9, weight_decay=0.1), 128)
    expected, velocity = 2.0, 0.0
    for rate in (0.1, 0.2, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = 3 * weight.detach()
        gradient = 3 * expected + 0.1 * expected
        velocity = 0.9 * velocity + gradient
        expected -= rate * (gradient + 0.9 * velocity)
        optimizer.step()
    assert weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", [OptimConfig(name="sgd"), OptimConfig(name="muon")])
def test_first_fp16_step_may_be_skipped(config: OptimConfig) -> None:
    """An overflow in the very first step: the scaler skips it, and what follows is as if it had not been."""
    results = []
    for overflow in (False, True):
        layer = nn.Conv2d(64, 64, 1, bias=False)
        nn.init.constant_(layer.weight, 0.5)
        optimizer = optim.build_optimizer(layer, config, 128)
        scaler = NumberFormat("fp16", "cpu").grad_scaler()
        for gradient in ([float("inf")] if overflow else []) + [1.0, 2.0]:
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            layer.weight.grad = torch.full_like(layer.weight, gradient) * scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        results.append(layer.weight.detach().clone())
    assert torch.equal(*results)


def test_ema_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = optim.build_ema(model, OptimConfig(ema_decay=0.2))
    assert ema is not None
    for value in (1.0, 2.0, 4.0):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
    (average,) = ema.module.parameters()
    # The decay rises: 1/10, 2/11, then 0.2 instead of 3/12.
    first = 0.9
    second = 2 / 11 * first + 9 / 11 * 2
    assert average.item() == pytest.approx(0.2 * second + 0.8 * 4)


def test_metrics_add_up_and_count_what_is_not_finite() -> None:
    metrics = Metrics(ALONE)
    logits, labels = torch.tensor([[3.0, 0], [0, 1], [5, 0]]), torch.tensor([0, 0, 0])
    yes, no = torch.tensor(True), torch.tensor(False)
    metrics.add(6, torch.tensor(1.5), yes, logits, labels, torch.tensor([1, 2, 3, 4]))
    metrics.add(7, torch.tensor(2.5), no, logits[:1], labels[:1], torch.tensor([10, 20, 30, 2**45]))
    window = metrics.window() + Window()
    assert (window.num_samples, window.num_nonfinite) == (4, 1)
    assert metrics.first_nonfinite() == (8, [0])
    assert window.accuracy == 0.75
    assert metrics.receipt.words == [11, 22, 33, 2**45 + 4]
    metrics.add(8, torch.tensor(2.0), yes, logits, labels, torch.zeros(4, dtype=torch.int64))
    assert metrics.window().loss == 2.0


def test_receipt_is_one_digest_per_epoch() -> None:
    receipt, other = Receipt(), Receipt()
    receipt.add([1, 2, 3, 4], 5)
    receipt.add([10, 20, 30, 40], 5)
    other.add([11, 22, 33, 44], 10)
    receipt.end_epoch()
    other.end_epoch()
    assert receipt.digests() == other.digests()
    receipt.add([1, 1, 1, 1], 1)
    assert len(receipt.digests()) == 2
    assert receipt.digests()[0] != receipt.digests()[1]


def test_schedule_counts_in_steps() -> None:
    config = Config(train=TrainConfig(epochs=3, checkpoint_every_steps=4, log_every_steps=3))
    schedule = schedule_of(config, steps_per_epoch=5)
    assert schedule.total_steps == 15
    assert [s for s in range(1, 16) if schedule.should_save(s)] == [4, 8, 12, 15]
    assert [s for s in range(1, 16) if schedule.should_log(s)] == [3, 6, 9, 12, 15]
    assert [s for s in range(1, 16) if schedule.should_read(s)] == [3, 4, 5, 6, 8, 9, 10, 12, 15]
    assert {schedule.side(done) for done in range(15)} == {None}
    assert schedule_of(replace(config, train=TrainConfig(max_steps=7)), 5).total_steps == 7
    small = schedule_of(replace(config, augment=AugmentConfig(low_resolution_share=0.4)), 5)
    assert [small.side(done) for done in range(15)] == [24] * 6 + [None] * 9


def test_recalibrated_statistics_are_those_of_the_samples(data_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)).double().train()
    samples = np.arange(1000)
    with BetonLoader(data_dir / "train.beton", ALONE.device) as loader:
        evaluation.recalibrate(model, loader, samples, 250, NumberFormat("fp64", "cpu"), ALONE)
        batch = next(iter(loader.read(samples, 1000)))
    images = normalize(batch.images, torch.float64)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, images.mean(dim=(0, 2, 3)), atol=1e-12)
    chunks = images.view(4, 250, 3, 32, 32).var(dim=(1, 3, 4)).mean(dim=0)
    assert torch.allclose(norm.running_var, chunks, rtol=1e-12)
    assert model.training


def test_score_counts_each_sample_once(data_dir: Path) -> None:
    seen: list[torch.Tensor] = []

    class FirstPixel(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return nn.functional.one_hot((images[:, 0, 0, 0] > 0).long(), 10).double()

    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluation.score(FirstPixel(), loader, np.arange(1003), 100, FP32, ALONE, "flip")
        batch = next(iter(loader.read(np.arange(1003), 1003)))
    assert torch.equal(torch.cat(seen[::2]), normalize(batch.images, torch.float32))
    assert torch.equal(torch.cat(seen[1::2]), normalize(batch.images, torch.float32).flip(3))
    bright = (batch.images[:, 0, 0, 0].double() > 125.307).long()
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, bright), torch.ones(1003, dtype=torch.int64), accumulate=True)
    assert result.n == 1003
    assert result.confusion == confusion.tolist()
    assert result.confusion_tta is not None
    assert sum(map(sum, result.confusion_tta)) == 1003
    assert result.accuracy == (bright == batch.labels).sum().item() / 1003


@pytest.mark.parametrize("training", [True, False], ids=["in training", "in evaluation"])
def test_scoring_is_in_evaluation_mode(training: bool, data_dir: Path) -> None:
    """With the running statistics and without dropout, whatever mode the model is in, which it keeps."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10)).double().train(training)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluation.score(model, loader, np.arange(300), 100, NumberFormat("fp64", "cpu"), ALONE)
        batch = next(iter(loader.read(np.arange(300), 300)))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mean, variance = (x.view(3, 1, 1) for x in (before["0.running_mean"], before["0.running_var"]))
    images = (normalize(batch.images, torch.float64) - mean) / (variance + norm.eps).sqrt()
    logits = images.flatten(1) @ before["3.weight"].T + before["3.bias"]
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, logits.argmax(dim=1)), torch.ones(300, dtype=torch.int64), accumulate=True)
    assert result.confusion == confusion.tolist()
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, batch.labels).item(), rel=1e-12)


def test_six_views_are_flips_and_shifts_by_a_pixel(data_dir: Path) -> None:
    """A network that only sees the corner pixel, whose six views are weighted by hand."""

    class Corner(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(images[:, :, 0, 0].double(), (0, 7))

    with BetonLoader(data_dir / "test.beton", ALONE.device) as loader:
        result = evaluation.score(Corner(), loader, np.arange(300), 100, NumberFormat("fp64", "cpu"), ALONE, "six")
        batch = next(iter(loader.read(np.arange(300), 300)))
    pixels = normalize(batch.images, torch.float64)
    # Down right brings the reflected (1, 1) to the corner, up left what was at (1, 1); mirrored: the other side.
    logits = pixels[:, :, 0, 0] + pixels[:, :, 0, 31] + pixels[:, :, 1, 1] + pixels[:, :, 1, 30]
    guesses = torch.nn.functional.pad(logits, (0, 7)).argmax(dim=1)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, guesses), torch.ones(300, dtype=torch.int64), accumulate=True)
    assert result.confusion_tta == confusion.tolist()
    assert result.confusion_tta != result.confusion


def state(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((1000,), value)}, "config": "run: {}"}


def test_checkpoints_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 20, 3, 100_000_000, 7):
        checkpoint.save(tmp_path, step, state(step))
    assert checkpoint.all_steps(tmp_path) == [1, 3, 7, 20, 100_000_000]
    checkpoint.retain(tmp_path, current=100_000_000, newest=2, keep=[3])
    assert checkpoint.all_steps(tmp_path) == [3, 20, 100_000_000]
    assert len(list(tmp_path.iterdir())) == 6
    # A later one was passed over as damaged: it must not push out the valid ones.
    checkpoint.save(tmp_path, 30, state(30))
    checkpoint.retain(tmp_path, current=30, newest=2, keep=[])
    assert checkpoint.all_steps(tmp_path) == [20, 30]
    subprocess.run(["sha256sum", "--quiet", "-c", "step-00000020.pt.sha256"], cwd=tmp_path, check=True)


def test_sweep_removes_what_a_kill_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))
    (tmp_path / ".step-00000002.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "step-00000002.pt.sha256").write_text("0  step-00000002.pt\n")
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000001.pt.sha256"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no digest", "directory"])
def test_newest_valid_passes_over_damage(damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))
    path = checkpoint.save(tmp_path, 2, state(2.0))
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:2000] + bytes([data[2000] ^ 4]) + data[2001:])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no digest":
        path.with_name(path.name + ".sha256").unlink()
    else:
        path.unlink()
        path.mkdir()
    warnings: list[str] = []
    found = checkpoint.newest_valid(tmp_path, warnings.append)
    assert found is not None
    assert found[0] == checkpoint.path_of(tmp_path, 1)
    assert checkpoint.decode(found[1], "it")["model"]["weight"][0] == 1.0
    assert len(warnings) == 1
    assert str(path) in warnings[0]


def test_no_valid_checkpoint_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "nothing", print) is None
    checkpoint.save(tmp_path, 1, state(1.0)).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.newest_valid(tmp_path, lambda _: None)


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: a small file system needs root")
def test_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    try:
        first = checkpoint.save(tmp_path, 1, state(1.0))
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            checkpoint.save(tmp_path, 2, {"model": {"weight": torch.zeros(200_000)}, "config": ""})
        assert checkpoint.all_steps(tmp_path) == [1]
        assert hashlib.sha256(first.read_bytes()).hexdigest() == digest
        assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_peoples_files(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of cifar_dist"):
        checkpoint.decode(checkpoint.read_verified(path, need_digest=False), "x.pt")
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(nn.Linear(2, 2), {"weight": torch.zeros(3, 2)}, "x.pt")


def test_model_digest_ignores_memory_order_and_sees_every_bit() -> None:
    torch.manual_seed(0)
    model = inception_v1(stem="strided", width=0.125)
    digest = checkpoint.sha256_of_parameters(model)
    named = model.named_parameters()
    by_hand = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for _, p in named)).hexdigest()
    assert digest == by_hand
    model.to(memory_format=torch.channels_last)
    assert checkpoint.sha256_of_parameters(model) == digest
    with torch.no_grad():
        model.classifier.bias[3] = torch.nextafter(model.classifier.bias[3], torch.tensor(9.0))
    assert checkpoint.sha256_of_parameters(model) != digest


def test_number_formats() -> None:
    cpu = torch.device("cpu")
    assert number_format("fp64", cpu).parameters == torch.float64
    assert number_format("bf16", cpu).inputs == torch.bfloat16
    assert number_format("fp16", cpu).grad_scaler().is_enabled()
    assert not number_format("fp32", cpu).grad_scaler().is_enabled()
    assert number_format("auto", cpu).name in ("bf16", "fp32")
    with number_format("fp16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
