"""Precision of a run: dtypes, and what auto means."""

from __future__ import annotations

import pytest
import torch

from cifar_dist.config import PrecisionName
from cifar_dist.distributed import World
from cifar_dist.errors import UserError
from cifar_dist.training import precision
from cifar_dist.training.precision import Precision, choose_precision, common_precision, is_compiled


def test_number_formats() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("fp64", cpu).parameters == torch.float64
    assert choose_precision("bf16", cpu).inputs == torch.bfloat16
    assert choose_precision("fp16", cpu).grad_scaler().is_enabled()
    assert not choose_precision("fp32", cpu).grad_scaler().is_enabled()
    assert choose_precision("auto", cpu).name in ("bf16", "fp32")
    with choose_precision("fp16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize(
    ("wanted", "rank", "device", "lines"),
    [
        ("fp16", "0", "cpu", 1), ("fp16", "1", "cpu", 0), ("bf16", "0", "cpu", 0), ("fp32", "0", "cpu", 0),
        ("fp64", "0", "cpu", 0), ("auto", "0", "cpu", 0), ("fp16", "0", "cuda", 0),
    ],
)  # fmt: skip
def test_fp16_on_a_cpu_is_warned_of_once(
    wanted: str, rank: str, device: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    precision._warn_of_slow_fp16.cache_clear()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for _ in range(2):
        choose_precision(wanted, torch.device(device))
    output = capsys.readouterr().err
    assert len(output.splitlines()) == lines
    assert not lines or output.startswith("warning: precision is fp16, which CPUs compute more than ten times")


def test_auto_must_mean_one_precision_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new processors in one run: sums of gradients would mix precisions."""
    world, names = World(0, 2, 0, 2, torch.device("cpu")), ["bf16", "bf16"]
    monkeypatch.setattr(precision, "run_and_sync_errors", lambda _, work: work())
    monkeypatch.setattr(precision, "all_gather_text", lambda *_: names)
    assert common_precision("auto", world) == choose_precision("auto", world.device)
    names[1] = "fp32"
    with pytest.raises(UserError, match="auto, which means bf16 and fp32 on the devices of these 2 processes"):
        common_precision("auto", world)


@pytest.mark.parametrize(
    ("trained", "device", "expected"),
    [
        ("auto", "cuda", "fp16"), ("bf16", "cuda", "fp16"), ("fp16", "cuda", "fp16"), ("fp32", "cuda", "fp32"),
        ("bf16", "cpu", "bf16"), ("fp16", "cpu", "bf16"), ("fp64", "cpu", "fp64"),
    ],
)  # fmt: skip
def test_auto_after_training(trained: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without bf16, and on a CPU with it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    assert choose_precision("auto", torch.device(device), trained).name == expected


@pytest.mark.parametrize(
    ("name", "device_type", "expected"),
    [
        ("bf16", "cuda", torch.bfloat16),
        ("fp16", "cuda", torch.float32),
        ("fp32", "cuda", torch.float32),
        ("fp64", "cuda", torch.float64),
        ("bf16", "cpu with bf16", torch.bfloat16),
        ("bf16", "cpu without", torch.float32),
    ],
)
def test_number_format_of_muon(
    name: PrecisionName, device_type: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: device_type == "cpu with bf16")
    assert Precision(name, device_type.split()[0]).muon == expected


@pytest.mark.parametrize(
    ("wanted", "device_type", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("on", "cuda", True), ("off", "cuda", False)],
)
def test_what_is_compiled(wanted: str, device_type: str, expected: bool) -> None:
    assert is_compiled(wanted, device_type) == expected
