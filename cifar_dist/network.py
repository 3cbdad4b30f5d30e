"""Addresses and interfaces of this machine, found by its routes: a name service may be slow or wrong."""

import socket
from contextlib import suppress

import psutil

from cifar_dist.errors import UserError

LOOPBACK = ("127.0.0.1", "::1")
_ELSEWHERE = "192.0.2.1"  # of RFC 5737, for examples; nothing is sent there


def loopback() -> str:
    """The address at which this machine reaches itself.

    Raises:
        UserError: it does not, as where the loopback interface is down.
    """
    for address in LOOPBACK:
        with suppress(OSError), socket.socket(_family(address), socket.SOCK_STREAM) as server:
            server.bind((address, 0))
            server.listen(1)
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
            return address
    raise UserError(
        f"{socket.gethostname()} cannot connect to itself at {' or '.join(LOOPBACK)}, which its processes need to find "
        f"each other.\nBring up the loopback interface: ip link set lo up"
    )


def is_local(address: str) -> bool:
    """Whether `address`, an IP address, is one of this machine. Binding to it is no proof (ip_nonlocal_bind)."""
    return address.startswith("127.") or interface_of(address) is not None


def own_address(target: str) -> str | None:
    """This machine's address on its way to `target`, the name or address of a machine; None if there is no way.

    If `target` is a name of this machine that stands for loopback here, as Debian's 127.0.1.1: the address on the way
    to other machines.
    """
    found = _source(target)
    if found is not None and found.startswith("127.") and target not in (*LOOPBACK, "localhost"):
        return _source(_ELSEWHERE)
    return found


def interface_of(address: str) -> str | None:
    """The name of the network interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def _source(target: str) -> str | None:
    with suppress(OSError, UnicodeError):
        family, kind, *_, place = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing, but chooses a route
            return str(probe.getsockname()[0])
    return None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
