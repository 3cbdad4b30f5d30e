"""status.json: whether a run is at work, and how it ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar_dist.errors import StopError, UserError, end
from cifar_dist.files import write_text_atomic
from cifar_dist.training import checkpoint
from cifar_dist.training.summary import to_json

FILE = "status.json"


@contextmanager
def kept(directory: Path, writes: Callable[[], bool]) -> Iterator[None]:
    """Keep `directory`/status.json while this process `writes`: running, then done, stopped (by a signal) or failed.

    A run that is killed leaves "running", with the host and process that it was. From an error on, signals are ignored:
    torchrun sends them to all ranks once one has failed.

    Raises:
        UserError: it cannot be written.
    """
    if writes():
        write(directory, "running", None)
    try:
        yield
    except BaseException as error:
        end()
        status = "stopped" if isinstance(error, StopError) else "failed"
        code = error.exit_code if isinstance(error, (UserError, StopError)) else 1
        if writes():
            with suppress(UserError):  # the error itself says more
                write(directory, status, code, str(error))
        raise
    if writes():
        write(directory, "done", 0)


def write(directory: Path, status: str, exit_code: int | None, message: str = "") -> None:
    """Replace `directory`/status.json.

    Raises:
        UserError: it cannot be written.
    """
    steps = checkpoint.all_steps(directory / "checkpoints")
    facts: dict[str, Any] = {"status": status, "exit_code": exit_code}
    if message:
        facts["message"] = message[:2000]
    facts |= {
        "last_checkpoint_step": steps[-1] if steps else None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    try:
        write_text_atomic(directory / FILE, to_json(facts))
    except OSError as error:
        raise UserError(
            f"{directory / FILE} cannot be written: {error.strerror}. Make room, then go on with --run.resume auto."
        ) from None
