"""Checkpoints that are complete or absent.

A checkpoint is step-NNNNNNNN.pt with its SHA-256 beside it in step-NNNNNNNN.pt.sha256 (the format of
`sha256sum -c`). It is written under a temporary name, flushed to the disk and renamed, its digest first; so what
bears the final name is whole, and a flipped bit shows. It holds plain tensors, numbers and strings, which
`torch.load` reads with weights_only=True.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_dist.errors import CheckpointError
from cifar_dist.files import write_bytes_atomic, write_text_atomic

HOW_TO_GO_ON = "Give the old values, or start anew under another --run.name without --run.resume."
FORMAT = 3  # 1 knew no optimizer but SGD, 2 no validation left to do
_NAME = re.compile(r"step-(\d{8,})\.pt")


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.pt"


def save(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`.

    Raises:
        CheckpointError: the disk is full or the directory not writable; the earlier checkpoints are untouched.
    """
    return write(directory, step, encode(step, state))


def encode(step: int, state: dict[str, Any]) -> bytes:
    """What the file of a checkpoint holds."""
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT, "step": step}, buffer)
    return buffer.getvalue()


def write(directory: Path, step: int, data: bytes) -> Path:
    """Write the bytes of a checkpoint and their digest; errors as for `save`."""
    path = path_of(directory, step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text_atomic(_digest_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
        write_bytes_atomic(path, data)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written: {path}: {error.strerror} ({len(data) / 1e6:.0f} MB "
            f"are needed). The earlier checkpoints are as they were. Make room, then go on with --run.resume auto."
        ) from None
    return path


def all_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, valid or not, ascending. Ordered by step: clocks go wrong."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(match[1]) for path in found if (match := _NAME.fullmatch(path.name)))


def read_verified(path: Path, need_digest: bool = True) -> bytes:
    """The bytes of a checkpoint, equal to its digest.

    Raises:
        CheckpointError: it cannot be read, is damaged, or has no digest although one is needed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}. Give the path of a step-*.pt file.") from None
    try:
        expected = _digest_path(path).read_text(encoding="utf-8").split()[:1]
    except FileNotFoundError:
        if need_digest:
            raise CheckpointError(f"{path}: its digest {_digest_path(path).name} is missing.") from None
        return data
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{_digest_path(path)}: {error}") from None
    if expected != [hashlib.sha256(data).hexdigest()]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from that in {_digest_path(path).name}.")
    return data


def decode(data: bytes, origin: str) -> dict[str, Any]:
    """The state in a checkpoint's bytes, on the CPU. Nothing in it is executed.

    Raises:
        CheckpointError: it is no checkpoint of this project.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{origin} is not a checkpoint that can be loaded safely: {detail}") from None
    if not isinstance(state, dict) or not {"format", "step", "model", "config"} <= state.keys():
        raise CheckpointError(f"{origin} is no checkpoint of cifar_dist: it lacks format, step, model or config.")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{origin} has format {state['format']}; this version reads format {FORMAT}.")
    return state


def newest_valid(
    directory: Path, warn: Callable[[str], None], differs: Callable[[dict[str, Any], Path], str] = lambda *_: ""
) -> tuple[Path, bytes] | None:
    """The newest checkpoint that equals its digest and is of this run, with its bytes; None when there are none at all.

    Undamaged ones of other runs that came before it are renamed, lest they be removed as damaged ones are.

    Args:
        warn: takes a line about each that is passed over.
        differs: in what a state is another run's, as the end of a sentence; empty for one of this run.

    Raises:
        CheckpointError: there are checkpoints, and none is valid, or none is of this run.
    """
    steps = all_steps(directory)
    others: list[tuple[Path, str]] = []
    for step in reversed(steps):
        path = path_of(directory, step)
        try:
            data = read_verified(path)
        except CheckpointError as error:
            warn(f"warning: passed over: {error}")
            continue
        unfit = _unfit(data, step, path, differs)
        if unfit:
            others.append((path, unfit))
            continue
        for other, why in others:
            warn(f"warning: passed over, and renamed to {_set_aside(other).name}: {other} {why}")
        return path, data
    if others:
        raise CheckpointError(f"{others[0][0]} {others[0][1]}\n{HOW_TO_GO_ON}")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {directory} is valid. To begin anew, choose another run.name."
        )
    return None


def _unfit(data: bytes, step: int, path: Path, differs: Callable[[dict[str, Any], Path], str]) -> str:
    """Why a run cannot go on from these bytes, as the end of a sentence; empty if it can."""
    try:
        state = decode(data, str(path))
        difference = differs(state, path)
    except CheckpointError as error:
        return f"cannot be used: {error}"
    if not difference and state["step"] != step:
        return f"is the checkpoint of step {state['step']}, whatever its name says."
    return difference


def _set_aside(path: Path) -> Path:
    for file in (_digest_path(path), path):
        file.rename(file.with_name(file.name + ".other"))
    return path.with_name(path.name + ".other")


def retain(directory: Path, current: int, newest: int, keep: Iterable[int]) -> None:
    """Remove all checkpoints but the `newest` ones up to step `current` and those of the steps `keep`.

    Later ones than the current are damaged ones that a resume passed over; they must not push out valid ones.
    """
    steps = all_steps(directory)
    past = [step for step in steps if step <= current]
    for step in set(steps) - set(past[-newest:]) - set(keep):
        path = path_of(directory, step)
        path.unlink(missing_ok=True)
        _digest_path(path).unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove what a process that was killed while writing left: temporary files, and digests without a file."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in directory.glob("step-*.pt.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def load_weights(model: nn.Module, weights: Any, origin: str) -> None:
    """Copy a state dict into `model`.

    Raises:
        CheckpointError: names or shapes are those of another model.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise CheckpointError(f"{origin} holds another model: " + " ".join(lines)[:600]) from None


def sha256_of_parameters(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters in state-dict order, each in its logical (NCHW) order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
