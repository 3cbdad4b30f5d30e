"""Errors that a user can act on, and the exit code of each kind.

Every message says what is wrong, where, and what to do. `torchrun` itself always exits with 1 after a worker
failed; the codes below are those of the process that failed, and of plain `python -m cifar_dist.train`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_CODES = "CIFAR_DIST_EXIT_CODES"
"""The environment variable with a folder in which each rank leaves its exit code."""
_ending = threading.Event()


class UserError(ValueError):
    """A setting, an argument or a file of the user's is wrong."""

    exit_code = 2
    shared = False  # every rank raises it, so that rank 0 alone prints it


class DataError(UserError):
    """The dataset is missing, damaged, or not CIFAR-10."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is damaged, unreadable, or of another model or configuration."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or a parameter stopped being a finite number."""

    exit_code = 5


class PeerError(UserError):
    """Another process of the run failed or stopped answering."""

    exit_code = 6


class RunInUseError(UserError):
    """Another process is at work in the run directory."""

    exit_code = 7


class DivergedError(UserError):
    """The processes of the run do not hold the same model."""

    exit_code = 8


class StopError(BaseException):
    """The run was asked to stop by a signal, and saved what there was to save.

    No Exception, as a signal may come while some library catches all of those.
    """

    exit_code = 75


def shared(error: UserError) -> UserError:
    """Mark an error that every rank raises alike, so that only rank 0 prints it."""
    error.shared = True
    return error


KINDS: tuple[type[UserError], ...] = (
    UserError, DataError, CheckpointError, NonFiniteError, PeerError, RunInUseError, DivergedError
)  # fmt: skip


@contextmanager
def reported(alike: bool = False) -> Iterator[None]:
    """Turn a `UserError` into its message on stderr and its exit code, without a traceback.

    Args:
        alike: whatever is raised inside is raised by every rank of the job alike.
    """
    try:
        yield
    except UserError as error:
        end()
        if speaks() or not (alike or error.shared):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            leave_time_to_speak()
        leave_code(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except StopError as error:
        end()
        if speaks():
            print(error, file=sys.stderr, flush=True)
        leave_code(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if speaks():
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception:
        end()
        leave_code(1)
        raise


def end() -> None:
    """From now on this process is on its way out, and no signal may hide why."""
    _ending.set()


def ending() -> bool:
    return _ending.is_set()


def leave_code(code: int) -> None:
    """For the launcher, since torchrun does not pass it on."""
    folder = os.environ.get(EXIT_CODES)
    if folder:
        with suppress(OSError):
            Path(folder, os.environ.get("RANK", "0")).write_text(str(code))


def leave_time_to_speak() -> None:
    """Let rank 0 print what all ranks know: torchrun stops every process as soon as one has failed."""
    time.sleep(3)


def speaks() -> bool:
    """Whether this process prints for its whole job: rank 0, or a process outside torchrun."""
    return os.environ.get("RANK", "0") == "0"
