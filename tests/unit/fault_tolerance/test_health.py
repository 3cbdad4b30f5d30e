"""Checksums that no difference escapes, and who is outvoted."""

from __future__ import annotations

import copy

import pytest
import torch

from cifar_dist.config import Config, TrainConfig
from cifar_dist.distributed import World
from cifar_dist.errors import DivergedError, NonFiniteError, UserError
from cifar_dist.fault_tolerance import health
from cifar_dist.fault_tolerance.health import (
    advice,
    checksums,
    explain_out_of_memory,
    refuse_divergence,
    refuse_nonfinite,
    tensors_of_state,
)

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    return [(tensor * 100).to(dtype) for tensor in (filters, torch.randn(7, generator=generator), torch.tensor(1.5))]


@pytest.mark.parametrize("dtype", FORMATS)
def test_one_bit_shows_in_its_tensor_alone(dtype: torch.dtype) -> None:
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    expected = checksums(tensors(dtype))
    assert torch.equal(checksums(tensors(dtype)), expected)
    for which in range(3):
        for bit in (0, 5, 8 * dtype.itemsize - 1):
            changed = tensors(dtype)
            flat = changed[which].reshape(-1).clone()
            flat.view(bits)[len(flat) // 2] ^= -(2**bit) if bit == 8 * dtype.itemsize - 1 else 2**bit
            changed[which] = flat.reshape(changed[which].shape)
            assert (checksums(changed) != expected).tolist() == [k == which for k in range(3)]


def test_nan_is_a_number_like_any_other() -> None:
    values = [torch.tensor([1.0, float("nan"), float("-inf")]), torch.zeros(2)]
    assert torch.equal(checksums(values), checksums(values))
    assert checksums([torch.tensor([0.0])]) != checksums([torch.tensor([-0.0])])


def test_order_in_memory_is_of_no_matter() -> None:
    values = torch.randn(4, 3, 5, 5)
    assert torch.equal(checksums([values]), checksums([values.to(memory_format=torch.channels_last)]))


def test_formats_side_by_side() -> None:
    mixed = [tensors(dtype)[1] for dtype in FORMATS]
    changed = [tensor.clone() for tensor in mixed]
    changed[2][3] += 1
    assert (checksums(mixed) != checksums(changed)).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("sums", "who"),
    [
        ([5, 5, 6], "rank 2 on n2 differs from the other ranks"),
        ([6, 5, 5, 5], "rank 0 on n0 differs from the other ranks"),
        ([6, 5, 5, 5, 7], "rank 0 on n0, rank 4 on n4 differ from the other ranks"),
        ([5, 6], "rank 0 on n0, rank 1 on n1: all suspect"),
        ([5, 5, 6, 6], "rank 0 on n0, rank 1 on n1, rank 2 on n2, rank 3 on n3: all suspect"),
        ([1, 2, 3], "rank 0 on n0, rank 1 on n1, rank 2 on n2: all suspect"),
    ],
)
def test_the_majority_is_right(sums: list[int], who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(sums)
    monkeypatch.setattr(health, "all_gather", lambda *_: torch.tensor([[1, own] for own in sums]))
    monkeypatch.setattr(health, "all_gather_text", lambda *_: [f"n{rank}" for rank in range(size)])
    tensors = {"same": torch.zeros(1), "weight": torch.zeros(1)}
    with pytest.raises(DivergedError, match=rf"First of 1 tensors that differ: weight\. {who}\."):
        refuse_divergence(tensors, World(0, size, 0, size, torch.device("cpu")), 7, None)


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "moving average of 1.bias", "momentum_buffer of 0.bias"])
def test_what_is_not_finite_is_named(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    tensors = tensors_of_state(model, copy.deepcopy(model), optimizer)
    refuse_nonfinite(tensors, 7, None)
    with torch.no_grad():
        tensors[name].view(-1)[1] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"{name} is infinite or NaN after step 7, so it is not saved\. There"):
        refuse_nonfinite(tensors, 7, None)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB.",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_out_of_memory_in_all_wordings(text: str) -> None:
    """Of torch 2.15: those of libtorch_cuda.so were read in it."""
    with pytest.raises(UserError, match="rank 3 ran out of memory"), explain_out_of_memory(Config(), 3, 8):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="a mistake"), explain_out_of_memory(Config(), 3, 8):
        raise RuntimeError("a mistake")


@pytest.mark.parametrize(
    ("micro", "world_size", "said"),
    [
        (480, 2, "on 2 processes is 240: --train.micro_batch_size 240"),
        (120, 8, "on 8 processes is 60: --train.micro_batch_size 60"),
        (2, 1, "no lower one is possible"),
    ],
)
def test_advice_on_out_of_memory(micro: int, world_size: int, said: str) -> None:
    config = Config(train=TrainConfig(batch_size=960, micro_batch_size=micro))
    text = advice(config, "train.micro_batch_size", world_size)
    assert f"train.micro_batch_size is {micro}" in text
    assert said in text
    assert "--eval.batch_size 250" in advice(config, "eval.batch_size", world_size)
