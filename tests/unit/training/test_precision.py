"""Precision of a run: dtypes, and what auto means."""

from __future__ import annotations

import torch

from cifar_dist.training.precision import choose_precision


def test_number_formats() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("fp64", cpu).parameters == torch.float64
    assert choose_precision("bf16", cpu).inputs == torch.bfloat16
    assert choose_precision("fp16", cpu).grad_scaler().is_enabled()
    assert not choose_precision("fp32", cpu).grad_scaler().is_enabled()
    assert choose_precision("auto", cpu).name in ("bf16", "fp32")
    with choose_precision("fp16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
