"""Checks the rendezvous port of several nodes before torch waits there.

If another program uses the port, torch notices late or never, and prints a traceback.
"""

import errno
import itertools
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from cifar_dist import environment
from cifar_dist.errors import PeerError, UserError
from cifar_dist.network import is_local

_CONNECT_S, _ANSWER_S = 3.0, 8.0
_NAME_SERVICE_S, _NO_ANSWER_S = 5.0, 60.0


def check(address: str, port: int, opens: bool) -> bool:
    """Refuse a port that another program uses. Wait for the node that opens the port, unless this process does.

    Returns whether `address` is one of this node.

    Args:
        opens: this process opens the port; otherwise any process on the node with that address may.

    Raises:
        UserError: the port is in use, or the address does not exist.
        PeerError: nothing answered within MEET_TIMEOUT_S.
    """
    here = socket.gethostname()
    local = any(is_local(found) for found in _resolve(address, here))
    if opens:
        in_use = is_port_in_use(port)
    elif local:  # a process of this node opens the port, maybe this one
        in_use = is_port_in_use(port) and not _is_store(address, port)
    else:
        _wait(address, port)
        in_use = not _is_store(address, port)
    if in_use:
        with socket.create_server(("", 0)) as free:
            other = free.getsockname()[1]
        raise UserError(
            f"port {port} on {address} is in use by another program.\n"
            f"Give another MASTER_PORT, the same on every node, e.g. MASTER_PORT={other}, or stop that program."
        )
    if opens and not local:  # only a warning: the network may translate addresses
        text = f"MASTER_ADDR {address} is not an address of this node, {here}, although its NODE_RANK is 0."
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return local


def _resolve(address: str, here: str) -> list[str]:
    """The IP addresses of the name `address`."""
    answer: list[list[str] | Exception] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            answer.append([str(place[0]) for *_, place in found])
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NAME_SERVICE_S)
    if not answer:
        text = f"waiting up to {_NO_ANSWER_S:.0f} s for the name service of {here} to find MASTER_ADDR {address}"
        print(text, file=sys.stderr, flush=True)
        thread.join(_NO_ANSWER_S)
    found = answer[0] if answer else TimeoutError("no answer")
    if isinstance(found, Exception):
        raise UserError(
            f"MASTER_ADDR {address} cannot be resolved on {here}: {getattr(found, 'strerror', None) or found}.\n"
            f"Give the name or IP address of a node of the run that all other nodes reach."
        )
    return found


def is_port_in_use(port: int) -> bool:
    """Whether torch could not listen at `port` on this node."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
                probe.bind(("", port))  # all addresses of this node
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


def _wait(address: str, port: int) -> None:
    """Wait until a program listens there."""
    limit_s = environment.number("MEET_TIMEOUT_S", 300, least=1)
    started = time.monotonic()
    for attempt in itertools.count():
        with suppress(OSError):
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
            return
        if attempt == 0:
            text = f"waiting up to {limit_s} s for {address}:{port}; nothing listens there yet"
            print(text, file=sys.stderr, flush=True)
        elif time.monotonic() > started + limit_s:
            raise PeerError(
                f"nothing answered at {address}:{port} within {limit_s} s, as seen from {socket.gethostname()}.\n"
                f"Check that launch/multinode runs on {address} with the same MASTER_PORT, and that no firewall blocks "
                f"it. MEET_TIMEOUT_S sets how long nodes wait for each other."
            )
        time.sleep(0.5)


def _is_store(address: str, port: int) -> bool:
    """Whether torch's store listens there. In a thread, because torch may wait forever for another program."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=_ANSWER_S)
    stores: list[TCPStore] = []

    def connect() -> None:
        with suppress(RuntimeError):
            stores.append(TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_ANSWER_S + 1)
    return bool(stores)
