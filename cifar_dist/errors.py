"""Errors that a user can act on, and their exit codes.

A message says what is wrong, where, and what to do. torchrun exits with 1 whatever a worker's code was;
`python -m cifar_dist.cluster.launcher` exits with the worker's code, and so does plain `python -m cifar_dist.train`.
"""

import os
import sys
import threading
import time
from bdb import BdbQuit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar_dist.phase import current

EXIT_CODES = "CIFAR_DIST_EXIT_CODES"
"""Environment variable: the folder in which each rank writes its exit code for the launcher."""
_EXIT_S = 6.0  # from the message of an error to the end of the process; what W&B has not uploaded stays on the disk
_shutting_down = threading.Event()


class UserError(ValueError):
    """Base of all errors that end a run with a message instead of a traceback.

    Itself: a setting, an argument or a file of the user is wrong.
    """

    exit_code = 2

    def __init__(self, text: str, *, printed_elsewhere: bool = False) -> None:
        """`printed_elsewhere`: another rank prints this error, so this one does not, unless it is rank 0."""
        super().__init__(text)
        self.printed_elsewhere = printed_elsewhere


class DataError(UserError):
    """The dataset is missing, damaged, or not CIFAR-10."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is damaged, unreadable, or belongs to another model or configuration."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss, a gradient or a parameter is infinite or NaN, or a gradient too large to be summed."""

    exit_code = 5


class PeerError(UserError):
    """Another process of the run failed or stopped responding."""

    exit_code = 6


class RunInUseError(UserError):
    """Another process owns the run directory."""

    exit_code = 7


class DivergedError(UserError):
    """The ranks do not hold the same model."""

    exit_code = 8


class StopError(BaseException):
    """A signal stopped the run. What it had computed is saved; before the first step there is nothing to save.

    Not an Exception: a signal may arrive inside library code that catches every Exception.
    """

    exit_code = 75


KINDS: tuple[type[UserError], ...] = (UserError, *UserError.__subclasses__())


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error without line breaks, cut to `limit` characters; its type if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def explain_os_error(what: str, advice: str = "") -> Iterator[None]:
    """Convert an OSError inside to a `UserError`: `what`, the system's reason, and `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}. {advice}".rstrip()) from None


@contextmanager
def exit_on_error(on_all_ranks: bool = False) -> Iterator[None]:
    """Convert an error to the exit of the process with its code, after `report`.

    Args:
        on_all_ranks: every rank raises the same errors inside, so only rank 0 prints them.
    """
    try:
        yield
    except (Exception, StopError, KeyboardInterrupt) as error:  # noqa: BLE001
        raise SystemExit(report(error, on_all_ranks)) from None


def exit_code(error: BaseException) -> int:
    """The exit code after an error; 130 after Ctrl-C and after `q` in pdb."""
    if isinstance(error, (UserError, StopError)):
        return error.exit_code
    return 130 if isinstance(error, (KeyboardInterrupt, BdbQuit)) else 1


@contextmanager
def report_errors() -> Iterator[None]:
    """`report` errors before the contexts around this one close what may not end."""
    try:
        yield
    except (Exception, StopError, KeyboardInterrupt) as error:
        report(error)
        raise


def report(error: BaseException, on_all_ranks: bool = False) -> int:
    """Print an error to stderr, a `UserError` without a traceback, and write its exit code for the launcher.

    From then on signals are ignored, and a process of several ends within `_EXIT_S`. A second call prints nothing.

    Returns the exit code.
    """
    code = exit_code(error)
    if getattr(error, "reported", False):
        return code
    begin_shutdown()
    if isinstance(error, Exception):
        _exit_within(_EXIT_S, code)
    below_bar = "\n" if current.step and sys.stderr is not None and sys.stderr.isatty() else ""  # the progress bar
    if isinstance(error, UserError):
        if is_main_process() or not (on_all_ranks or error.printed_elsewhere):
            print(f"{below_bar}error: {error}", file=sys.stderr, flush=True)
        else:
            wait_for_main_process(3 if on_all_ranks else 1)
    elif isinstance(error, Exception) and not isinstance(error, BdbQuit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif is_main_process():
        default = "ended in the debugger" if isinstance(error, BdbQuit) else "interrupted"
        print(f"{below_bar}{str(error) or default}", file=sys.stderr, flush=True)
    trains = getattr(sys.modules["__main__"].__spec__, "name", "") == "cifar_dist.train"
    if trains and is_main_process() and not (EXIT_CODES in os.environ and "RANK" in os.environ):
        suggest_doctor(code)  # of processes that a launcher started, the launcher does
    write_exit_code(code)
    error.reported = True  # type: ignore[attr-defined]
    return code


def suggest_doctor(code: int) -> None:
    """After an exit code whose cause may be the machine, print how to check it; under srun, on the first node only."""
    if code in (1, PeerError.exit_code) and (os.environ.get("SLURM_PROCID") or "0") == "0":
        print(f"`{sys.executable} -m cifar_dist.doctor` checks this machine.", file=sys.stderr, flush=True)


def _exit_within(seconds: float, code: int) -> None:
    """If this process is one of several: end it after `seconds`, whatever it may wait for, such as for its GPU."""
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        timer = threading.Timer(seconds, os._exit, [code])
        timer.daemon = True
        timer.start()


def begin_shutdown() -> None:
    """Ignore signals from now on, so that the reason for the exit stays what it is."""
    _shutting_down.set()


def shutting_down() -> bool:
    return _shutting_down.is_set()


def write_exit_code(code: int) -> None:
    """Write this rank's exit code where the launcher reads it: torchrun does not pass it on."""
    folder = os.environ.get(EXIT_CODES)
    if folder:
        with suppress(OSError):
            Path(folder, os.environ.get("RANK") or "0").write_text(str(code))


def wait_for_main_process(seconds: float) -> None:
    """Give rank 0 time to print: torchrun stops all ranks as soon as one has exited with an error."""
    time.sleep(seconds)


def is_main_process() -> bool:
    """Whether this process is rank 0, or the only one."""
    return (os.environ.get("RANK") or "0") == "0" or (os.environ.get("WORLD_SIZE") or "1") == "1"
