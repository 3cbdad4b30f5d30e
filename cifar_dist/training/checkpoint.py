"""Checkpoints that are complete or absent.

A checkpoint is step-NNNNNNNN.pt with its SHA-256 beside it in step-NNNNNNNN.pt.sha256 (the format of `sha256sum -c`).
Both are written atomically, the digest first, so that no .pt file lacks it. A checkpoint holds tensors, numbers and
strings only, which `torch.load` reads with weights_only=True.
"""

import errno
import hashlib
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.files import TEMPORARY, write_bytes_atomic, write_text_atomic

FORMAT = 4  # 1 had SGD only; 2 had no `validation_due`; 3 had sums of losses as floats
# What torch.load raises for files that it cannot read, by their first bytes.
NOT_LOADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
    struct.error,
)  # fmt: skip
_NAME = re.compile(r"step-(\d{8,})\.pt")


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.pt"


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def target(path: Path) -> Path:
    """`path`; of a link without a digest beside it the file it links to, which has its digest and run beside it."""
    return path.resolve() if path.is_symlink() and not digest_path(path).exists() else path


def encode(step: int, state: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file.

    Raises:
        UserError: `decode` would refuse them.
    """
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT, "step": step}, buffer)
    data = buffer.getvalue()
    if refused := torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
        raise UserError(
            f"the state dict of an own network or optimizer (model.name, optim.name) holds "
            f"{', '.join(sorted(refused))}, so no checkpoint of it could be loaded. Use tensors, numbers and strings."
        )
    return data


def write(directory: Path, step: int, data: bytes) -> Path:
    """Write the bytes of a checkpoint (from `encode`) and their digest.

    Raises:
        CheckpointError: the disk is full or the directory not writable; the earlier checkpoints are untouched.
    """
    path = path_of(directory, step)
    digest = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A step is saved again if a stop had postponed its validation. Until the new file is in place, the digest file
        # has the digests of both, so an interruption damages neither.
        old = digest_path(path).read_text("utf-8", "replace") if path.exists() and digest_path(path).exists() else ""
        write_text_atomic(digest_path(path), digest + old)
        write_bytes_atomic(path, data)
        if old:
            write_text_atomic(digest_path(path), digest)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written: {path}: {error.strerror} ({len(data) / 1e6:.0f} MB are "
            f"needed). Earlier checkpoints are unchanged. {'Make room' if full else 'Mend this'}, then resume with "
            f"--run.resume auto."
        ) from None
    return path


def all_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, valid or not, ascending."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(match[1]) for path in found if (match := _NAME.fullmatch(path.name)))


def read_verified(path: Path, need_digest: bool = True) -> bytes:
    """The bytes of a checkpoint, verified against its digest.

    Raises:
        CheckpointError: it cannot be read, is damaged, or has no digest although `need_digest`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}. Give the path of a step-*.pt file.") from None
    try:
        lines = digest_path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if need_digest:
            raise CheckpointError(f"{path}: its digest {digest_path(path).name} is missing.") from None
        return data
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{digest_path(path)}: {error}") from None
    if hashlib.sha256(data).hexdigest() not in {line.split(" ")[0] for line in lines}:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from that in {digest_path(path).name}.")
    return data


def decode(data: bytes, origin: str) -> dict[str, Any]:
    """The state in a checkpoint's bytes, on the CPU. Executes no code in it.

    Raises:
        CheckpointError: it is not a checkpoint of this project.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except NOT_LOADABLE as error:
        text = f"{origin} is not a checkpoint: it {why_not_loadable(data, error)}. Give runs/NAME or its step-*.pt."
        raise CheckpointError(text) from None
    if not isinstance(state, dict) or not {"format", "step", "model", "config"} <= state.keys():
        raise CheckpointError(f"{origin} is not a checkpoint of cifar_dist: it lacks format, step, model or config.")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{origin} has format {state['format']}; this version reads format {FORMAT}. Use "
            f"the version of cifar_dist that wrote it, or start a new run."
        )
    return {"statistics": False, "weights_sha256": None} | state  # older files have neither


def why_not_loadable(data: bytes, error: Exception) -> str:
    """Why torch.load with weights_only=True raised `error`, whose text advises to load the file without it."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return "is no file of PyTorch, or is cut short"
    if isinstance(error, pickle.UnpicklingError):
        return "holds other objects than tensors, numbers and strings, so it was not loaded"
    return "is an export, or damaged"


def retain(directory: Path, current: int, num_newest: int, also: Iterable[int]) -> None:
    """Keep the `num_newest` newest checkpoints up to step `current`, those of the steps `also`, and later ones."""
    past = [step for step in all_steps(directory) if step <= current]
    for step in set(past[:-num_newest]) - set(also):
        path = path_of(directory, step)
        path.unlink(missing_ok=True)
        digest_path(path).unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove what a process left that was killed while writing: temporary files, and digests without a checkpoint."""
    for path in directory.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    for path in directory.glob("step-*.pt.sha256"):
        if _NAME.fullmatch(path.stem) and not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def load_weights(model: nn.Module, weights: Any, origin: str) -> None:
    """Copy a state dict into `model`.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        detail = " ".join(line.strip() for line in lines[1:4] or lines)  # torch's first line has no details
        raise CheckpointError(f"{origin} holds another model: {detail[:600]}") from None
