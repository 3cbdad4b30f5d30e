"""status.json: whether a run is running, and how it ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar_dist.errors import StopError, UserError, begin_shutdown
from cifar_dist.files import write_json
from cifar_dist.training import checkpoint

FILE = "status.json"


@contextmanager
def status_file(directory: Path, may_write: Callable[[], bool]) -> Iterator[None]:
    """Write `directory`/status.json: running inside, then done, stopped (by a signal) or failed.

    A killed run leaves "running" with its host and process id. After an error signals are ignored, because torchrun
    sends SIGTERM to all ranks once one has failed.

    Args:
        may_write: whether this process owns the directory.

    Raises:
        UserError: it cannot be written.
    """
    if may_write():
        write(directory, "running", None)
    try:
        yield
    except BaseException as error:
        begin_shutdown()
        status = "stopped" if isinstance(error, StopError) else "failed"
        code = error.exit_code if isinstance(error, (UserError, StopError)) else 1
        if may_write():
            with suppress(UserError):  # the first error is the one to report
                write(directory, status, code, str(error))
        raise
    if may_write():
        write(directory, "done", 0)


def write(directory: Path, status: str, exit_code: int | None, message: str = "") -> None:
    """Replace `directory`/status.json.

    Raises:
        UserError: it cannot be written.
    """
    steps = checkpoint.all_steps(directory / "checkpoints")
    values: dict[str, Any] = {"status": status, "exit_code": exit_code}
    if message:
        values["message"] = message[:2000]
    values |= {
        "last_checkpoint_step": steps[-1] if steps else None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    try:
        write_json(directory / FILE, values)
    except OSError as error:
        raise UserError(
            f"{directory / FILE} cannot be written: {error.strerror}. Make room, then resume with --run.resume auto."
        ) from None
