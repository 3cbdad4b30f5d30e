"""GPUs: what the machine has, what torch sees, whether each computes. NOT TRIED on a machine with GPUs yet."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.diagnosis.checks import Finding, Folders
from cifar_dist.errors import one_line

if TYPE_CHECKING:
    import torch

_SMI_S = 60  # it takes seconds for each GPU without persistence mode


def nvidia_files() -> list[Path]:
    """The device files of GPUs, which are there without a working driver library."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def gpus(_: Folders) -> Iterator[Finding]:
    """Compare device files, nvidia-smi and torch, then compute on each GPU."""
    files, (listed, smi_failure) = nvidia_files(), _nvidia_smi()
    if not files and not listed:
        yield Finding("ok", "there is no GPU: training uses CPUs")
        return
    import torch

    have, visible = max(len(files), len(listed)), os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        found = f"torch {torch.__version__} is built for CPUs, so {have} GPU(s) stay unused"
        yield Finding("problem", found, "Install a torch for CUDA: see pytorch.org/get-started")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and visible is not None and not re.match("[0-9]|GPU-|MIG-", visible):
        found = f"CUDA_VISIBLE_DEVICES is '{visible}', which hides {have} GPU(s): training uses CPUs"
        yield Finding("warning", found, "unset CUDA_VISIBLE_DEVICES")
    elif count == 0:
        advice = "Compare the driver's CUDA version (nvidia-smi) with torch's; a container needs --gpus all"
        yield Finding("problem", f"torch finds none of {have} GPU(s): {_cuda_failure() or smi_failure}", advice)
    elif count < have and visible is None:
        found = f"torch finds {count} of {have} GPUs"
        yield Finding("warning", found, "nvidia-smi shows which GPU is lost or belongs to others")
    computed = Counter(_compute(torch.device("cuda", index)) for index in range(count))
    for finding, number in computed.items():
        yield finding._replace(found=f"{number} x {finding.found}; {'; '.join(sorted({*listed}))}".rstrip("; "))


def _nvidia_smi() -> tuple[list[str], str]:
    """The driver version for each GPU, and why nvidia-smi failed."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], one_line(error)
    if done.returncode:
        return [], f"nvidia-smi: {one_line(done.stdout + done.stderr)}"
    return [f"driver {line.strip()}" for line in done.stdout.splitlines() if line.strip()], ""


def _cuda_failure() -> str:
    """Why CUDA cannot start, such as a driver that is too old."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - RuntimeError, AssertionError and others
        return one_line(error)
    return ""


def _compute(device: "torch.device") -> Finding:
    """A product of integers, whose result is exact in fp32 and TF32."""
    import torch

    name, number = torch.cuda.get_device_name(device), device.index
    try:
        matrix = torch.arange(256 * 256).view(256, 256).remainder(7).float()
        right = torch.equal((matrix.to(device) @ matrix.to(device)).cpu(), matrix @ matrix)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        advice = "nvidia-smi shows who uses it; a torch for another CUDA version may lack code for this GPU"
        return Finding("problem", f"{name} (cuda:{number}) cannot compute: {one_line(error)}", advice)
    if not right:
        return Finding("problem", f"{name} (cuda:{number}) computes wrong products", "Do not train on this GPU")
    if free < total / 2:
        found = f"{name} (cuda:{number}) has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        return Finding("warning", found, "nvidia-smi shows which programs use it")
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16, so training takes fp16"
    return Finding("ok", f"{name}, {total / 2**30:.0f} GiB, {bf16}, CUDA {torch.version.cuda}")
