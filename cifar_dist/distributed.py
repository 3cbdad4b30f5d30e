"""This process among the others: ranks, devices, and the few collectives that are not DDP's.

Tensors and JSON cross the wire, never pickled objects: torch's store and gloo check no identities.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.errors import KINDS, PeerError, UserError
from cifar_dist.place import waiting
from cifar_dist.roll_call import RollCall

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
TIMEOUT_S = 600  # for a collective; what is named in a report of a standstill (training.stall) comes before
_SIGNS_OF_A_LOST_PEER = (
    "by peer", "Timed out", "Broken pipe", "Connection refused", "remote process exited", "collective operation timeout"
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """rank of size processes on num_nodes machines, local_rank of local_size on this one, at work on device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    num_nodes: int = 1
    roll_call: RollCall | None = None

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """For messages: the rank, and the machine where there are several."""
        return f"rank {self.rank}" + (f" on {socket.gethostname()}" if self.local_size < self.size else "")


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone without it; leave them at the end.

    On CPUs, torch's threads are the processors that this process may use, divided by the ranks on the machine.

    Raises:
        UserError: the device is not there.
        PeerError: a collective failed because another process did.
    """
    env = os.environ
    size, local_size = int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(env.get("LOCAL_RANK", 0))
    try:
        found = _device(device, local_rank, local_size)
    except UserError as error:
        error.shared = local_rank > 0  # the first process of each machine speaks for it
        raise
    world = World(int(env.get("RANK", 0)), size, local_rank, local_size, found, int(env.get("GROUP_WORLD_SIZE", 1)))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        keep_freed_memory()
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        device_id = world.device if world.device.type == "cuda" else None
        try:
            timeout = timedelta(seconds=TIMEOUT_S)
            store, _, _ = next(rendezvous("env://", world.rank, size, timeout=timeout))
            group_store = PrefixStore("group", store)
            dist.init_process_group(
                backend, timeout=timeout, device_id=device_id, store=group_store, rank=world.rank, world_size=size
            )
            world = replace(world, roll_call=RollCall(store, world.rank, size))
        except (ValueError, RuntimeError) as error:
            detail = (str(error).splitlines() or [""])[0][:300]
            raise PeerError(
                f"{size} processes were announced by WORLD_SIZE, but they cannot meet: {detail}\n"
                f"Start them with torchrun or launch/node."
            ) from error
    try:
        with naming_lost_peers(world):
            yield world
    finally:
        if world.roll_call:
            world.roll_call.close()
        if size > 1:
            dist.destroy_process_group()


@contextmanager
def naming_lost_peers(world: World) -> Iterator[None]:
    """Turn what gloo and NCCL raise when another process is gone into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if world.size > 1 and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER):
            raise _lost_peer(world, error) from error
        raise


def _lost_peer(world: World, error: RuntimeError) -> PeerError:
    missing = world.roll_call.missing() if world.roll_call else []
    if missing is None:
        lost = f"rank 0 or its machine ({os.environ.get('MASTER_ADDR')})"  # which has the store
    else:
        lost = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    # Without the place in gloo's source, and its guesses at the end.
    detail = re.sub(r"\[/\S+\] ", "", (str(error).splitlines() or [""])[0]).split(". ")[0][:160]
    found = PeerError(
        f"{world.name} lost contact with {lost or 'another process'}, which failed or was stopped: {detail}\n"
        f"Look for the first error above and in the run's logs/; then go on with --run.resume auto."
    )
    found.shared = world.roll_call is not None and not world.roll_call.speaks()
    return found


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, not to give it back to the kernel, which hands out zeroed pages again.

    A training step frees and allocates the same tensors over and over; see docs/performance.md for what it pays.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise UserError(
            "train.device is cuda, but torch finds no GPU here. Check nvidia-smi, or use --train.device cpu."
        )
    if local_size > found:
        raise UserError(
            f"{local_size} processes on this machine, but only {found} GPU{'s' if found > 1 else ''}. "
            f"Start at most {found} here (--nproc_per_node {found}), or use --train.device cpu."
        )
    return torch.device("cuda", local_rank)


def data_parallel(module: nn.Module, group: Any = None) -> DistributedDataParallel:
    """`module`, whose gradients are averaged over the ranks of `group` (all) at each backward pass."""
    # Training does not touch batch-norm buffers, so there is nothing to broadcast at each step. Torch before 2.15 knows
    # the old name only.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True, **sync)


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Add `tensor` up over all ranks, in place."""
    if world.size > 1:
        with waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(tensor: Tensor, world: World) -> Tensor:
    """The `tensor` (...) of all ranks, on the CPU: (size, ...)."""
    mine = tensor.cpu()
    if world.size == 1:
        return mine[None]
    parts = [torch.empty_like(mine) for _ in range(world.size)]
    with waiting():
        dist.all_gather(parts, mine)
    return torch.stack(parts)


def together(world: World, work: Callable[[], Any], at_work: bool = True, timeout_s: int = TIMEOUT_S) -> Any:
    """Run `work` on the ranks where `at_work`; all ranks wait, at most `timeout_s`, and all raise if it fails on one.

    Returns what `work` returned, on the other ranks None. An OSError counts as the user's, with the file's name. Of
    several machines the message names that of the failure, which prints it as well as rank 0.

    Raises:
        UserError: the error of the lowest rank that failed, of its kind, with its message.
    """
    value, failure = None, None
    if at_work:
        try:
            value = work()
        except UserError as error:
            failure = error
        except OSError as error:
            failure = UserError(f"{error.filename or 'writing a file'}: {error.strerror or error}")
    if world.size == 1:
        if failure:
            raise failure
        return value
    failed = torch.full((), world.rank if failure else world.size)
    group: Any = None  # all ranks, with the usual timeout
    with waiting():
        if timeout_s != TIMEOUT_S:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=group)
    first = int(failed)
    if first < world.size:
        several = world.local_size < world.size
        text = f"{world.name}: {failure}" if several else str(failure)
        told = _broadcast({"kind": type(failure).__name__, "text": text} if failure else None, world, first)
        kind = next((k for k in KINDS if k.__name__ == told["kind"]), UserError)
        known = kind(told["text"])
        known.shared = world.rank != first or world.rank < world.local_size
        raise known
    return value


def from_rank0(world: World, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and give every rank what it returned (JSON types) or raised (`UserError`)."""
    value = together(world, work, at_work=world.rank == 0)
    return _broadcast(value, world, 0) if world.size > 1 else value


def broadcast_bytes(data: bytes, world: World, source: int = 0) -> bytes:
    """The `data` of rank `source` on every rank."""
    if world.size == 1:
        return data
    mine = world.rank == source
    length = torch.tensor(len(data))
    with waiting():
        dist.broadcast(length, source)
        # frombuffer refuses zero bytes, so one more travels along.
        payload = torch.empty(int(length) + 1, dtype=torch.uint8)
        if mine:
            payload = torch.frombuffer(bytearray(data + b" "), dtype=torch.uint8)
        dist.broadcast(payload, source)
    return payload.numpy()[:-1].tobytes()


def _broadcast(value: Any, world: World, source: int) -> Any:
    return json.loads(broadcast_bytes(json.dumps(value).encode(), world, source))
