"""torchrun with meaningful exit codes: `python -m cifar_dist.cluster.launcher OPTIONS -m cifar_dist.train ...`.

Takes torchrun's options. torchrun exits with 1 after any failure or signal; this exits with the code of the worker that
failed (see `errors`), or with 75 after a stop signal if the workers have saved. It forwards SIGUSR1, which would kill
torchrun and orphan the workers, ignores a hangup under nohup, and exits at once at a second Ctrl-C. With --max-restarts
it restarts only if that can help (see `restarts`). It checks the rendezvous port before torch waits there (see
`rendezvous`). Environment variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT replaces --shutdown-timeout.
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

from cifar_dist import environment, network
from cifar_dist.cluster import rendezvous
from cifar_dist.errors import EXIT_CODES, PeerError, StopError, UserError, exit_on_error, one_line, suggest_doctor
from cifar_dist.fault_tolerance import signals
from cifar_dist.process import (
    LAUNCHER,
    SHUTDOWN_S,
    handled_signals,
    kill_process_tree,
    quick_imports,
    run_and_exit,
    write_stderr,
)


def main() -> None:
    """Run torchrun in this process and exit with the code of its workers."""
    with tempfile.TemporaryDirectory(prefix="cifar_dist-", ignore_cleanup_errors=True) as folder, exit_on_error():
        signals.install_handlers()  # before torchrun starts, a signal ends this process
        os.environ |= {EXIT_CODES: folder, LAUNCHER: str(os.getpid())}
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers set their own; otherwise torchrun warns
        os.environ.setdefault("LOGLEVEL", "ERROR")  # otherwise torchrun logs each process that it stops
        # torchrun kills workers after this time. Saving a checkpoint takes a second, closing W&B up to 30.
        os.environ[SHUTDOWN_S] = str(environment.number(SHUTDOWN_S, 60, least=1))
        # A shared store keeps a key of the first start, on which a restart waits forever.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        # Otherwise torch's C++ prints pages of stack addresses for a lost process.
        level = os.environ.get("TORCH_CPP_LOG_LEVEL")
        os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
        with signals.deferred(), quick_imports():  # importing torch swallows exceptions
            from torch.distributed import run

            # Signals are handled here, as a second one would abort torchrun's shutdown. Nothing sends SIGSTKFLT.
            words = ["--signals-to-handle", "SIGSTKFLT", *sys.argv[1:]]
            options: Namespace = run.parse_args(words)  # type: ignore[no-untyped-call]
        os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # for the workers
        endpoint: str = run.get_rdzv_endpoint(options)  # type: ignore[no-untyped-call]
        _check_rendezvous(options)
        with signals.deferred():
            code = _torchrun(options, endpoint)
    suggest_doctor(code)
    raise SystemExit(code)


def _check_rendezvous(options: Namespace) -> None:
    """Check the port where the nodes meet, unless torch chooses one itself.

    Then set what torch would otherwise ask the name service: this node's address, and whether it hosts the rendezvous.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    static = options.rdzv_backend == "static"
    endpoint = options.rdzv_endpoint or (f"{options.master_addr}:{options.master_port or 0}" if static else "")
    try:
        address, port = parse_rendezvous_endpoint(endpoint, default_port=0)
    except ValueError as error:
        raise UserError(f"MASTER_ADDR:MASTER_PORT: {one_line(error)}") from None
    own = options.local_addr
    if port and not options.standalone and options.rdzv_backend in ("static", "c10d"):
        local = rendezvous.check(address, port, opens=static and options.node_rank == 0)
        # MASTER_ADDR is an address that all others reach.
        own = own or (address if local else network.own_address(address))
        if not static and local:
            options.rdzv_endpoint = f"localhost:{port}"
        elif not static and "is_host" not in (options.rdzv_conf or ""):
            options.rdzv_conf = ",".join(filter(None, (options.rdzv_conf, "is_host=0")))
    elif options.standalone or options.nnodes in ("1", "1:1"):
        own = own or network.loopback()
    options.local_addr = own


class _Stop:
    """Signal handler: the first signal stops torchrun and its workers; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.at is None:
            self.at = time.monotonic()
            if number == signal.SIGINT:
                write_stderr("\nstopping after this step; Ctrl-C again exits at once")
                number = signal.SIGTERM  # a worker without handlers yet would print a traceback for SIGINT
            raise SignalException(f"received {signal.Signals(number).name}", signal.Signals(number))
        if number == signal.SIGINT and time.monotonic() - self.at > signals.SAME_KEYSTROKE_S:
            kill_process_tree(os.getpid())
            shutil.rmtree(os.environ[EXIT_CODES], ignore_errors=True)
            os._exit(128 + number)


def _torchrun(options: Namespace, endpoint: str) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher import api

    from cifar_dist.cluster.restarts import Agent, failure_code, num_killed, written_codes

    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]  # a patch, because torchrun has no option for it
    socket.getfqdn = lambda name="": name or socket.gethostname()  # a patch: torch asks the name service, for its logs
    stop = _Stop()
    for number in handled_signals():
        signal.signal(number, stop)
    try:
        signals.raise_if_requested()
        run.run(options)  # type: ignore[no-untyped-call]
        return 0
    except ChildFailedError as error:
        return failure_code([failure.exitcode for failure in error.failures.values()], written_codes())
    except SignalException as error:
        if killed := num_killed():
            after = f"within {os.environ[SHUTDOWN_S]} s after {error.sigval.name}"
            raise PeerError(
                f"{killed} of the processes on {socket.gethostname()} did not stop {after} and were killed.\n"
                f"Their last checkpoint stays; resume with --run.resume auto."
            ) from None
        codes = written_codes()  # code 6 (lost a peer) does not count: that peer had stopped before
        return 0 if codes == {0} else failure_code([], codes - {PeerError.exit_code}) or StopError.exit_code
    except Exception as error:
        if code := failure_code([], written_codes()):  # the node that hosts the rendezvous has exited first
            return code
        if isinstance(error, (RendezvousError, DistError)):
            raise PeerError(_rendezvous_failed(endpoint, error)) from None
        raise
    finally:
        stop.at = stop.at or time.monotonic()  # from now on no signal changes the exit code
        kill_process_tree(os.getpid())


def _rendezvous_failed(endpoint: str, error: Exception) -> str:
    known = {
        "RendezvousTimeoutError": "fewer nodes have joined than NNODES",
        "RendezvousClosedError": "the run has ended on another node",
        "RendezvousConnectionError": "the node with that address is gone",
    }
    detail = known.get(type(error).__name__) or str(error).partition("\n")[0][:200] or type(error).__name__
    return (
        f"{socket.gethostname()} cannot connect to the other nodes at {endpoint}: {detail}\n"
        f"See the messages of the other nodes; all need the same MASTER_ADDR, MASTER_PORT, NNODES and RUN_ID. Then "
        f"start all of them again with --run.resume auto."
    )


if __name__ == "__main__":
    run_and_exit(main, needs_output=False)
