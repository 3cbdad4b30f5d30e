"""torchrun with an exit code that says what happened: `python -m cifar_dist.launch OPTIONS -m cifar_dist.train ...`.

The options are torchrun's. It always exits with 1 when a worker failed or a signal came, whatever the workers did; this
exits with the code of the worker that failed of its own (see `errors`), or 75 when the run was asked to stop. It passes
on SIGUSR1, too, which would kill torchrun and leave its workers behind, and a second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from cifar_dist import stopping
from cifar_dist.errors import EXIT_CODES, PeerError, StopError, reported

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
            # One key of a shared store stays from the first start, and a restart in place waits on it.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            with stopping.hold():
                code = _torchrun([*_OPTIONS, *sys.argv[1:]], folder)
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


def _torchrun(arguments: list[str], folder: Path) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stop = _Stop(folder)
    for number in stopping.SIGNALS:
        signal.signal(number, stop)
    try:
        stopping.check()
        run.run(run.parse_args(arguments))  # type: ignore[no-untyped-call]
        return 0
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in failures.items():
            if code < 0:
                print(f"error: rank {rank} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
        return what_failed(failures.values(), _left(folder))
    except SignalException:
        left = _left(folder)
        return 0 if left == {0} else what_failed([], left - {PeerError.exit_code}) or StopError.exit_code
    except Exception:
        # The node with the rendezvous may have ended first.
        code = what_failed([], _left(folder))
        if not code:
            raise
        return code
    finally:
        stop.at = stop.at or time.monotonic()  # it is over: no signal changes the code
        kill_children()


def what_failed(failures: Iterable[int], left: set[int]) -> int:
    """The exit code that says most: of a failure of its own, then of a wish to stop, then of a lost process; else 0.

    Args:
        failures: of the workers that torchrun saw failing, the exit codes; -n: killed by signal n.
        left: the codes that workers left themselves, of which torchrun may have stopped some.
    """
    seen = [PeerError.exit_code if code < 0 else code for code in failures]
    lost = any(code < 0 for code in failures)
    peers = {0, PeerError.exit_code, StopError.exit_code}
    for own in ([code for code in seen if code not in peers], sorted(left - peers)):
        if own:
            return own[0]
    # A worker that is killed makes torchrun stop the others, and they say so.
    order = (PeerError, StopError) if lost else (StopError, PeerError)
    return next((kind.exit_code for kind in order if kind.exit_code in {*seen, *left}), 0)


def kill_children() -> None:
    """Kill all that this process started, and what they did."""
    with suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


def _left(folder: Path) -> set[int]:
    return {int(text) for path in folder.iterdir() if (text := path.read_text())}


if __name__ == "__main__":
    main()
