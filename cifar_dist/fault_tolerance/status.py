"""status.json: whether a run is running, and how it ended."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from cifar_dist.errors import StopError, UserError, begin_shutdown, exit_code, explain_os_error
from cifar_dist.fault_tolerance.run_lock import slurm_job
from cifar_dist.files import write_json
from cifar_dist.training import checkpoint


@contextmanager
def status_file(directory: Path, world_size: int, may_write: Callable[[], bool]) -> Iterator[None]:
    """Write `directory`/status.json: running inside, then done, stopped (by a signal) or failed.

    A killed run leaves "running" with its host and process id. After an error signals are ignored, because torchrun
    sends SIGTERM to all ranks once one has failed.

    Args:
        may_write: whether this process owns the directory.

    Raises:
        UserError: it cannot be written.
    """

    def write_if_owner(status: str, code: int | None, message: str = "") -> None:
        if may_write():
            write(directory, status, code, world_size, message)

    write_if_owner("running", None)
    try:
        yield
    except BaseException as error:
        begin_shutdown()
        with suppress(UserError):  # the first error is the one to report
            stopped = isinstance(error, StopError)
            write_if_owner("stopped" if stopped else "failed", exit_code(error), str(error))
        raise
    write_if_owner("done", 0)


def write(directory: Path, status: str, code: int | None, world_size: int, message: str = "") -> None:
    """Replace `directory`/status.json.

    Raises:
        UserError: it cannot be written.
    """
    path, (job, restarts) = directory / "status.json", slurm_job()
    with explain_os_error(f"{path} cannot be written", "Make room, then resume with --run.resume auto."):
        values = {
            "status": status,
            "exit_code": code,
            **({"message": message[:2000]} if message else {}),
            "world_size": world_size,
            "last_checkpoint_step": max(checkpoint.all_steps(directory / "checkpoints"), default=None),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job,
            "restarts": restarts,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_json(path, values)
