"""Precision of a run, how its functions are compiled, and the global switches of torch's backends and of malloc."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch

from cifar_dist.config import PrecisionName, TrainConfig
from cifar_dist.distributed import World, all_gather_text, run_and_sync_errors
from cifar_dist.errors import UserError, is_main_process

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Precision:
    """`name` as in train.precision, without auto. Parameters are float64 for fp64, else float32."""

    name: PrecisionName
    device_type: str

    @property
    def parameters(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    @property
    def inputs(self) -> torch.dtype:
        """Dtype of the network's input images."""
        return _AUTOCAST.get(self.name, self.parameters)

    @property
    def muon(self) -> torch.dtype:
        """Dtype of Muon's iterations: bfloat16 for runs in bf16, if the device has products of such numbers."""
        fast = self.name == "bf16" and (self.device_type == "cuda" or _cpu_has_bf16())
        return torch.bfloat16 if fast else self.parameters

    def autocast(self) -> Any:
        return torch.autocast(self.device_type, self.inputs, enabled=self.name in _AUTOCAST)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, whose gradients would underflow; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(wanted: str, device: torch.device, trained: str = "auto") -> Precision:
    """The precision for `wanted`, as in train.precision; auto is resolved. Rank 0 warns of fp16 on a CPU.

    Args:
        trained: what auto meant in the run, and means again unless `device` lacks it or is slow in it; a note says so.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_has_bf16()
    if wanted == "auto":
        best = "bf16" if has_bf16 else "fp16" if on_gpu else "fp32"
        wanted = trained if trained in ("fp32", "fp64", best) or (trained == "fp16" and on_gpu) else best
        if trained not in ("auto", wanted) and is_main_process():
            text = f"the run was trained in {trained}, which this device lacks or is slow in; computing in {wanted}"
            print(f"note: {text}", file=sys.stderr, flush=True)
    if wanted == "bf16" and on_gpu and not has_bf16:
        raise UserError(
            f"precision is bf16, which {torch.cuda.get_device_name(device)} does not support. Use auto, fp16 or fp32."
        )
    if wanted == "fp16" and not on_gpu:
        _warn_of_slow_fp16()
    return Precision(cast(PrecisionName, wanted), device.type)


def common_precision(wanted: str, world: World, trained: str = "auto") -> Precision:
    """`choose_precision` on all ranks; a collective.

    Raises:
        UserError: on every rank; see there, or auto means different precisions on the ranks' devices.
    """
    precision: Precision = run_and_sync_errors(world, lambda: choose_precision(wanted, world.device, trained))
    names = dict.fromkeys(all_gather_text(precision.name, world))
    if len(names) > 1:
        raise UserError(
            f"precision is {wanted}, which means {' and '.join(names)} on the devices of these {world.size} processes. "
            "Give one that all have, such as fp32.",
            printed_elsewhere=True,
        )
    return precision


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 products; without them bf16 works, but slower than fp32."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@functools.cache  # once in a process
def _warn_of_slow_fp16() -> None:
    if is_main_process():
        text = "which CPUs compute more than ten times as slowly as fp32; auto takes a fast one"
        print(f"warning: precision is fp16, {text}", file=sys.stderr, flush=True)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, a forward pass gives the same bits for any number of ranks on the node.

    CPU: one thread, because oneDNN splits its work, and so rounds, by the number of threads. GPU: cuDNN chooses its
    algorithms by rule instead of by timing.
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


def is_compiled(wanted: str, device_type: str) -> bool:
    """Whether train.compile `wanted` means that training is compiled: auto does on GPUs, as CPUs take minutes."""
    return wanted == "on" or (wanted == "auto" and device_type == "cuda")


def compile_for_training(function: Callable[..., Any], cuda_graphs: bool = False, static_launcher: bool = False) -> Any:
    """`function` compiled by inductor for constant shapes. docs/gpus.md has the bytes that this saves on GPUs.

    Args:
        static_launcher: faster launches, only to measure their gain: a lost rank would not be noticed.
    """
    from torch._inductor import decomposition  # here, as it takes a second

    # torch 2.15 computes this gradient by atomic additions in float32. Without the entry inductor gathers it, as in
    # torch 2.11: fewer bytes, and sums in a fixed order.
    decomposition.decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
    # A result that is used twice is written to memory if it takes more reads than this. torch's default is 4; batch
    # norm reads 5 tensors, its backward pass more. A number above 8 gains nothing.
    options: dict[str, Any] = {"realize_reads_threshold": 8}
    # Inductor's own launcher holds the GIL, Triton's does not. Behind a collective that never ends a launch waits once
    # some 1,000 are pending (pytorch#109074), and with the GIL the watchdog and heartbeat threads would wait, too.
    options["use_static_cuda_launcher"] = static_launcher
    if cuda_graphs:
        options["triton.cudagraphs"] = True
    return torch.compile(function, dynamic=False, options=options)


def set_backends(config: TrainConfig, deterministic: bool, device: torch.device) -> None:
    """Set TF32, cuDNN, determinism and, on CPUs, malloc for this process."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    # Shapes are constant, so cuDNN's search for the fastest kernels pays; its choice may differ between runs.
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel, which would hand out zeroed pages.

    A training step frees and allocates the same tensors over and over; docs/performance.md has the gain.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
