"""Number formats and the switches of torch's backends: the one place where they are chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_dist.config import Precision, TrainConfig
from cifar_dist.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class NumberFormat:
    """name as in the configuration; parameters are float64 for fp64 and float32 otherwise."""

    name: Precision
    device_type: str

    @property
    def parameters(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    @property
    def inputs(self) -> torch.dtype:
        """What images are handed to the network as."""
        return _AUTOCAST.get(self.name, self.parameters)

    @property
    def muon(self) -> torch.dtype:
        """What Muon iterates in: bfloat16 where a GPU trains in it, whose products are then the fastest."""
        return torch.bfloat16 if self.name == "bf16" and self.device_type == "cuda" else self.parameters

    def autocast(self) -> Any:
        return torch.autocast(self.device_type, self.inputs, enabled=self.name in _AUTOCAST)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, whose gradients would underflow; passes it through for the others."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def number_format(wanted: str, device: torch.device) -> NumberFormat:
    """Settle `auto`, and refuse what the device cannot do.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_computes_bf16()
    if wanted == "auto":
        return NumberFormat("bf16" if has_bf16 else "fp16" if on_gpu else "fp32", device.type)
    if wanted == "bf16" and on_gpu and not has_bf16:
        raise UserError(
            f"train.precision is bf16, which {torch.cuda.get_device_name(device)} cannot compute in. "
            f"Use --train.precision fp16 or fp32."
        )
    formats: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp64": "fp64"}
    return NumberFormat(formats[wanted], device.type)


def _cpu_computes_bf16() -> bool:
    """Whether this processor has bf16 products; without them bf16 works, but slower than fp32."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, a forward pass gives the same bits however the work is shared out among processes.

    On CPUs it runs on one thread: oneDNN cuts its work, and so rounds, by the number of threads, of which a process
    has the fewer the more ranks there are. On GPUs cuDNN chooses by rule, not by a trial that may end differently.
    """
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    if device.type == "cpu":
        torch.set_num_threads(1)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.set_num_threads(threads)


def set_backends(config: TrainConfig, deterministic: bool) -> None:
    """Set TF32, cuDNN and determinism for this process."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    # Shapes never change, so cuDNN's search for the fastest kernels pays; its choice may differ between runs.
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
