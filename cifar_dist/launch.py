"""torchrun with an exit code that says what happened: `python -m cifar_dist.launch OPTIONS -m cifar_dist.train ...`.

The options are torchrun's. It always exits with 1 when a worker failed or a signal came, whatever the workers did; this
exits with the code of the worker that failed of its own (see `errors`), or 75 when the run was asked to stop. It passes
on SIGUSR1, too, which would kill torchrun and leave its workers behind, and a second Ctrl-C leaves at once. With
--max-restarts it starts again only what can go on (see `agent`), and it looks at the port where machines meet first.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from cifar_dist import meeting, stopping
from cifar_dist.errors import EXIT_CODES, PeerError, StopError, reported
from cifar_dist.processes import quick_imports, run_and_exit

# Torchrun kills what has not ended after so long; a checkpoint of these networks takes a second, W&B's end up to 30.
SHUTDOWN_TIMEOUT_S = 60
# The other signals are handled here: a second one would make torchrun break off its own shutdown.
_OPTIONS = ("--signals-to-handle", "SIGHUP,SIGQUIT")


def main() -> None:
    """Run torchrun in this process and exit with the code of what it ran."""
    folder = Path(tempfile.mkdtemp(prefix="cifar_dist-"))
    try:
        with reported():
            stopping.listen()  # until torchrun starts, a signal ends this at once
            os.environ |= {EXIT_CODES: str(folder), stopping.LAUNCHER: str(os.getpid())}
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers set theirs; without this torchrun warns
            os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
            os.environ.setdefault("LOGLEVEL", "ERROR")  # torchrun tells of each process that it stops
            # One key of a shared store stays from the first start, and a restart in place waits on it.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            # Of a lost process torch's C++ tells by pages of addresses, besides what is said of it here.
            loud = os.environ.get("TORCH_CPP_LOG_LEVEL")
            os.environ["TORCH_CPP_LOG_LEVEL"] = loud or "FATAL"
            with stopping.hold():  # an exception in the middle of torch's import is lost in it
                options = _parsed([*_OPTIONS, *sys.argv[1:]])
            os.environ["TORCH_CPP_LOG_LEVEL"] = loud or "ERROR"  # for the workers
            place = _meeting_place(options)
            if place:
                meeting.check(*place)
            with stopping.hold():
                code = _torchrun(options, place, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(code)


class _Stop:
    """The handler: the first signal stops torchrun, and by it the workers; Ctrl-C once more kills them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at: float | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.at is None:
            self.at = time.monotonic()
            if number == signal.SIGINT:
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")
                number = signal.SIGTERM  # Python answers SIGINT with a traceback, while a worker has yet to listen
            raise SignalException(f"{signal.Signals(number).name} came", signal.Signals(number))
        if number == signal.SIGINT and time.monotonic() - self.at > stopping.SAME_KEYSTROKE_S:
            kill_children()
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(128 + number)


def _parsed(arguments: list[str]) -> Namespace:
    with quick_imports():
        from torch.distributed import run

    options: Namespace = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    return options


def _torchrun(options: Namespace, place: tuple[str, int, bool] | None, folder: Path) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from cifar_dist.agent import codes_left, install, what_failed

    install()
    stop = _Stop(folder)
    for number in stopping.SIGNALS:
        signal.signal(number, stop)
    try:
        stopping.check()
        run.run(options)  # type: ignore[no-untyped-call]
        return 0
    except ChildFailedError as error:
        return what_failed([failure.exitcode for failure in error.failures.values()], codes_left())
    except SignalException:
        left = codes_left()
        return 0 if left == {0} else what_failed([], left - {PeerError.exit_code}) or StopError.exit_code
    except Exception as error:
        # The machine with the rendezvous may have ended first, or none has come.
        code = what_failed([], codes_left())
        if not code and isinstance(error, (RendezvousError, DistError)):
            raise PeerError(_cannot_meet(place, error)) from None
        if not code:
            raise
        return code
    finally:
        stop.at = stop.at or time.monotonic()  # it is over: no signal changes the code
        kill_children()


def _meeting_place(options: Namespace) -> tuple[str, int, bool] | None:
    """(address, port, whether this process is the one to open it); None where torch finds a port itself."""
    static = options.rdzv_backend == "static"
    if options.standalone or options.rdzv_backend not in ("static", "c10d"):
        return None
    if options.rdzv_endpoint:
        address, _, port = options.rdzv_endpoint.rpartition(":")
    elif static and options.master_port is not None:
        address, port = options.master_addr, options.master_port
    else:
        return None
    if not address or not str(port).isdigit() or int(port) == 0:
        return None
    return address.strip("[]"), int(port), static and int(options.node_rank) == 0


def _cannot_meet(place: tuple[str, int, bool] | None, error: Exception) -> str:
    where = f" at {place[0]}:{place[1]}" if place else ""
    known = {
        "RendezvousTimeoutError": "fewer have come than NNODES says",
        "RendezvousClosedError": "the run has ended on one of them",
        "RendezvousConnectionError": "the one with that address is gone",
    }
    detail = known.get(type(error).__name__) or (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    return (
        f"{socket.gethostname()} cannot meet the other machines{where}, or no longer: {detail}\n"
        f"Look at what the others say; do all have the same MASTER_ADDR, MASTER_PORT, NNODES and RUN_ID? Then start "
        f"all of them again, to go on with --run.resume auto."
    )


def kill_children() -> None:
    """Kill all that this process started, and what they did."""
    with suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


if __name__ == "__main__":
    run_and_exit(main)
