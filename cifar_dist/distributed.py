"""The process group: ranks, devices, and the collectives that DDP does not do.

Tensors and JSON are sent, never pickled objects: neither torch's store nor gloo authenticates its peers.
"""

import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cifar_dist import environment
from cifar_dist.errors import KINDS, PeerError, UserError
from cifar_dist.network import interface_of, loopback, own_address
from cifar_dist.phase import waiting

TIMEOUT_S = 600  # of a collective; the watchdog (fault_tolerance.watchdog) reports a stalled rank before that


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size`, `local_rank` of `local_size` on its node, and computes on `device`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    num_nodes: int = 1
    store: Store | None = None  # of the process group; None for a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """For messages: the rank, and the host if there are several nodes."""
        return f"rank {self.rank}" + (f" on {socket.gethostname()}" if self.local_size < self.size else "")


@contextmanager
def init_distributed(device: str, threads: int | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, and leave it at the end, but not after an error.

    Without torchrun the world has one process and no process group.

    Args:
        threads: of torch, on CPUs; None: see `environment.num_threads`.

    Raises:
        UserError: the device or the loopback interface does not exist, or a variable of torchrun holds no number.
        PeerError: the process group could not be formed.
    """
    number = environment.number
    size, local_size = number("WORLD_SIZE", 1, least=1), number("LOCAL_WORLD_SIZE", 1, least=1)
    rank, local_rank, num_nodes = number("RANK", 0), number("LOCAL_RANK", 0), number("GROUP_WORLD_SIZE", 1, least=1)
    try:
        found = _device(device, local_rank, local_size)
    except UserError as error:
        error.printed_elsewhere = local_rank > 0  # printed once per node
        raise
    world = World(rank, size, local_rank, local_size, found, num_nodes)
    processors = environment.num_processors(shared_by=local_size)
    # Otherwise inductor starts up to 32 compiling processes for each rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, processors)))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(threads or environment.num_threads(local_size))
    if size > 1:
        world = replace(world, store=_init_process_group(world))
    yield world
    # After an error this process ends without it: NCCL would wait for its last kernels, and those for a lost rank.
    if size > 1:
        dist.destroy_process_group()


def _avoid_the_name_service(world: World) -> None:
    """Find the store and gloo's network interface by addresses: a name service may be slow, wrong or absent."""
    if world.size == world.local_size:
        os.environ["MASTER_ADDR"] = loopback()  # torchrun gives this host's name
    address = own_address(os.environ.get("MASTER_ADDR", ""))
    interface = interface_of(address) if address else None
    if interface is not None and not os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _init_process_group(world: World) -> Store:
    on_gpu, timeout = world.device.type == "cuda", timedelta(seconds=TIMEOUT_S)
    store: Store
    _avoid_the_name_service(world)
    try:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, device_id=world.device if on_gpu else None,
            store=PrefixStore("group", store), rank=world.rank, world_size=world.size,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        detail = (str(error).splitlines() or [""])[0][:300]
        raise PeerError(
            f"WORLD_SIZE is {world.size}, but the processes cannot connect to each other: {detail}\n"
            f"Start them with torchrun or launch/node."
        ) from error
    return store


def _device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not num_gpus):
        return torch.device("cpu")
    if not num_gpus:
        raise UserError("device is cuda, but torch finds no GPU here. Check nvidia-smi, or use auto or cpu.")
    if local_size > num_gpus:
        raise UserError(
            f"{local_size} processes on this node, but only {num_gpus} GPU{'s' if num_gpus > 1 else ''}. "
            f"Start at most {num_gpus} here (--nproc_per_node {num_gpus}), or use the device cpu."
        )
    return torch.device("cuda", local_rank)


class _GroupOfOne(dist.ProcessGroup):
    """What DDP needs of a process group if there is a single process; without sockets, threads and communicators."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def allreduce(self, tensors: list[Tensor], _: object) -> Any:  # type: ignore[override]
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], _: object) -> Any:  # type: ignore[override]
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], _: object) -> Any:  # type: ignore[override]
        for output, tensor in zip(outputs[0], inputs, strict=True):
            output.copy_(tensor)
        return _done(outputs)

    def getBackendName(self) -> str:  # noqa: N802
        return "none"


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def data_parallel(module: nn.Module, group: Any = None) -> DistributedDataParallel:
    """`module` in DDP, which averages gradients over the ranks of `group`, or sums them by its communication hook.

    Without a `group`: over all ranks, or for this process alone if there is no process group.
    """
    group = group or (None if dist.is_initialized() else _GroupOfOne())
    # Buffers do not change in training (see models.layers.BatchNorm2d). torch 2.15 renamed the option.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True, **sync)


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world.size > 1:
        with waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(tensor: Tensor, world: World) -> Tensor:
    """The `tensor` (...) of every rank, on the CPU: (size, ...)."""
    own = tensor.cpu()
    if world.size == 1:
        return own[None]
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    with waiting():
        dist.all_gather(gathered, own)
    return torch.stack(gathered)


def all_gather_text(text: str, world: World) -> list[str]:
    """The `text` of every rank, cut to 96 bytes."""
    if world.size == 1:
        return [text]
    padded = torch.frombuffer(bytearray(text.encode()[:96].ljust(96)), dtype=torch.uint8)
    return [row.numpy().tobytes().decode(errors="replace").rstrip() for row in all_gather(padded, world)]


def run_and_sync_errors(world: World, work: Callable[[], Any], only_if: bool = True, timeout_s: int = TIMEOUT_S) -> Any:
    """Run `work` on the ranks where `only_if` holds. If it fails on one rank, all ranks raise its error.

    Every rank waits for the others, for at most `timeout_s`. An OSError becomes a UserError with the file's name. With
    several nodes the message names the failing rank and its host; if it is not on rank 0's node, it prints it, too.

    Returns what `work` returned on this rank; None where it did not run.

    Raises:
        UserError: of the class and with the message of the lowest rank that failed.
    """
    value, failure = None, None
    try:
        value = work() if only_if else None
    except UserError as error:
        failure = error
    except OSError as error:
        failure = UserError(f"{error.filename or 'writing a file'}: {error.strerror or error}")
    if world.size == 1:
        if failure:
            raise failure
        return value
    failed_rank = torch.full((), world.rank if failure else world.size)
    group: Any = None  # all ranks, with the default timeout
    with waiting():
        if timeout_s != TIMEOUT_S:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        dist.all_reduce(failed_rank, op=dist.ReduceOp.MIN, group=group)
    first = int(failed_rank)
    if first < world.size:
        text = f"{world.name}: {failure}" if world.local_size < world.size else str(failure)
        sent = _broadcast({"kind": type(failure).__name__, "text": text} if failure else None, world, first)
        kind = next((k for k in KINDS if k.__name__ == sent["kind"]), UserError)
        raise kind(sent["text"], printed_elsewhere=world.rank != first or world.rank < world.local_size)
    return value


def broadcast_from_main(world: World, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0; every rank returns its result (JSON types) or raises its `UserError`."""
    value = run_and_sync_errors(world, work, only_if=world.is_main)
    return _broadcast(value, world, 0) if world.size > 1 else value


def broadcast_bytes(data: bytes, world: World, source: int = 0) -> bytes:
    """The `data` of rank `source` on every rank."""
    if world.size == 1:
        return data
    length = torch.tensor(len(data))
    with waiting():
        dist.broadcast(length, source)
        # One byte more, since frombuffer refuses an empty buffer.
        payload = torch.empty(int(length) + 1, dtype=torch.uint8)
        if world.rank == source:
            payload = torch.frombuffer(bytearray(data + b" "), dtype=torch.uint8)
        dist.broadcast(payload, source)
    return payload.numpy()[:-1].tobytes()


def _broadcast(value: Any, world: World, source: int) -> Any:
    return json.loads(broadcast_bytes(json.dumps(value).encode(), world, source))
