"""torchrun with meaningful exit codes: `python -m cifar_dist.cluster.launcher OPTIONS -m cifar_dist.train ...`.

Takes torchrun's options. torchrun exits with 1 after any failure or signal; this exits with the code of the worker that
failed (see `errors`), or with 75 after a stop signal. It forwards SIGUSR1, which would kill torchrun and orphan the
workers, and exits at once at a second Ctrl-C. With --max-restarts it restarts only if that can help (see `restarts`).
It checks the rendezvous port before torch waits there (see `rendezvous`).
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
from types import FrameType

from cifar_dist.cluster import rendezvous
from cifar_dist.errors import EXIT_CODES, PeerError, StopError, exit_on_error
from cifar_dist.fault_tolerance import signals
from cifar_dist.process import STOP_SIGNALS, kill_process_tree, quick_imports, run_and_exit

# torchrun kills workers after this time. Saving a checkpoint takes a second, closing W&B up to 30.
SHUTDOWN_TIMEOUT_S = 60
# Other signals are handled here: a second one would abort torchrun's shutdown.
_OPTIONS = ("--signals-to-handle", "SIGHUP,SIGQUIT")


def main() -> None:
    """Run torchrun in this process and exit with the code of its workers."""
    with tempfile.TemporaryDirectory(prefix="cifar_dist-", ignore_cleanup_errors=True) as folder, exit_on_error():
        signals.install_handlers()  # before torchrun starts, a signal ends this process
        os.environ |= {EXIT_CODES: folder, signals.LAUNCHER: str(os.getpid())}
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers set their own; otherwise torchrun warns
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
        os.environ.setdefault("LOGLEVEL", "ERROR")  # otherwise torchrun logs each process that it stops
        # A shared store keeps a key of the first start, on which a restart waits forever.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        # Otherwise torch's C++ prints pages of stack addresses for a lost process.
        level = os.environ.get("TORCH_CPP_LOG_LEVEL")
        os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
        with signals.deferred(), quick_imports():  # importing torch swallows exceptions
            from torch.distributed import run

            options: Namespace = run.parse_args([*_OPTIONS, *sys.argv[1:]])  # type: ignore[no-untyped-call]
        os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # for the workers
        place = _rendezvous(options)
        if place:
            rendezvous.check(*place)
        with signals.deferred():
            code = _torchrun(options, place)
    raise SystemExit(code)


class _Stop:
    """Signal handler: the first signal stops torchrun and its workers; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.at is None:
            self.at = time.monotonic()
            if number == signal.SIGINT:
                os.write(2, b"\nstopping after this step; Ctrl-C again exits at once\n")
                number = signal.SIGTERM  # a worker without handlers yet would print a traceback for SIGINT
            raise SignalException(f"received {signal.Signals(number).name}", signal.Signals(number))
        if number == signal.SIGINT and time.monotonic() - self.at > signals.SAME_KEYSTROKE_S:
            kill_process_tree(os.getpid())
            shutil.rmtree(os.environ[EXIT_CODES], ignore_errors=True)
            os._exit(128 + number)


def _torchrun(options: Namespace, place: tuple[str, int, bool] | None) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher import api

    from cifar_dist.cluster.restarts import Agent, failure_code, written_codes

    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]  # a patch, because torchrun has no option for it
    stop = _Stop()
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        signals.raise_if_requested()
        run.run(options)  # type: ignore[no-untyped-call]
        return 0
    except ChildFailedError as error:
        return failure_code([failure.exitcode for failure in error.failures.values()], written_codes())
    except SignalException:
        codes = written_codes()  # code 6 (lost a peer) does not count: that peer had stopped before
        return 0 if codes == {0} else failure_code([], codes - {PeerError.exit_code}) or StopError.exit_code
    except Exception as error:
        # The node that hosts the rendezvous may have exited first, or nodes are missing.
        code = failure_code([], written_codes())
        if not code and isinstance(error, (RendezvousError, DistError)):
            raise PeerError(_rendezvous_failed(place, error)) from None
        if not code:
            raise
        return code
    finally:
        stop.at = stop.at or time.monotonic()  # from now on no signal changes the exit code
        kill_process_tree(os.getpid())


def _rendezvous(options: Namespace) -> tuple[str, int, bool] | None:
    """(address, port, whether this process opens it); None if torch chooses a port itself."""
    static = options.rdzv_backend == "static"
    if options.standalone or options.rdzv_backend not in ("static", "c10d"):
        return None
    endpoint = options.rdzv_endpoint or (f"{options.master_addr}:{options.master_port}" if static else "")
    address, _, port = endpoint.rpartition(":")
    if not address or not port.isdigit() or int(port) == 0:
        return None
    return address.strip("[]"), int(port), static and int(options.node_rank) == 0


def _rendezvous_failed(place: tuple[str, int, bool] | None, error: Exception) -> str:
    where = f" at {place[0]}:{place[1]}" if place else ""
    known = {
        "RendezvousTimeoutError": "fewer nodes have joined than NNODES",
        "RendezvousClosedError": "the run has ended on another node",
        "RendezvousConnectionError": "the node with that address is gone",
    }
    detail = known.get(type(error).__name__) or (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    return (
        f"{socket.gethostname()} cannot connect to the other nodes{where}: {detail}\n"
        f"See the messages of the other nodes; all need the same MASTER_ADDR, MASTER_PORT, NNODES and RUN_ID. Then "
        f"start all of them again with --run.resume auto."
    )


if __name__ == "__main__":
    run_and_exit(main)
