"""Checks the rendezvous port of several nodes before torch waits there.

If another program uses the port, torch notices late or never, and prints a traceback.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from cifar_dist.errors import PeerError, UserError

TIMEOUT_S = "MEET_TIMEOUT_S"
"""Environment variable: seconds that nodes wait for each other."""
DEFAULT_TIMEOUT_S = 300
_CONNECT_S, _ANSWER_S = 3.0, 8.0


def check(address: str, port: int, opens: bool) -> None:
    """Refuse a port that another program uses. Wait for the node that opens the port, unless this process does.

    Args:
        opens: this process opens the port; otherwise any process on the node with that address may.

    Raises:
        UserError: the port is in use, or the address does not exist.
        PeerError: nothing answered in time.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"MASTER_ADDR {address} cannot be resolved on {socket.gethostname()}: {reason}.\n"
            f"Give the name or IP address of a node of the run that all other nodes reach."
        ) from None
    local = any(_is_here(family, where[0]) for family, _, _, _, where in found)
    if opens:
        if _taken(port):
            raise _refused(address, port)
        if not local:  # only a warning: the network may translate addresses
            print(
                f"warning: MASTER_ADDR {address} is not an address of this node, {socket.gethostname()}, although its "
                f"NODE_RANK is 0.",
                file=sys.stderr,
                flush=True,
            )
    elif (_connects(address, port) or (not local and _appears(address, port))) and not _is_store(address, port):
        raise _refused(address, port)


def timeout_s() -> int:
    """Seconds that nodes wait for each other.

    Raises:
        UserError: the environment variable is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_S) or str(DEFAULT_TIMEOUT_S)
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UserError(f"{TIMEOUT_S} is {text!r}; valid: whole seconds, 1 or more.")
    return int(text)


def _is_here(family: int, address: str | int) -> bool:
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _taken(port: int) -> bool:
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
                probe.bind((anywhere, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


def _connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _appears(address: str, port: int) -> bool:
    """Wait until something listens there; True.

    Raises:
        PeerError: nothing did in time.
    """
    limit_s = timeout_s()
    print(f"waiting up to {limit_s} s for {address}:{port}; nothing listens there yet", file=sys.stderr, flush=True)
    deadline = time.monotonic() + limit_s
    while not _connects(address, port):
        if time.monotonic() > deadline:
            raise PeerError(
                f"nothing answered at {address}:{port} within {limit_s} s, as seen from {socket.gethostname()}.\n"
                f"Check that launch/multinode runs on {address} with the same MASTER_PORT, and that no firewall blocks "
                f"it. {TIMEOUT_S} sets how long nodes wait for each other."
            )
        time.sleep(0.5)
    return True


def _is_store(address: str, port: int) -> bool:
    """Whether torch's store listens there. In a thread, because torch may wait forever for another program."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    answers = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError):
            TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_S)
            )  # fmt: skip
            answers.set()

    threading.Thread(target=ask, daemon=True).start()
    return answers.wait(_ANSWER_S + 1)


def _refused(address: str, port: int) -> UserError:
    with socket.socket() as probe:
        probe.bind(("", 0))
        other = probe.getsockname()[1]
    return UserError(
        f"port {port} on {address} is in use by another program.\n"
        f"Give another MASTER_PORT, the same on every node, e.g. MASTER_PORT={other}, or stop that program."
    )
