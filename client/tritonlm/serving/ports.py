"""Addresses and ports: check whether a port is free, listen on it, and find the host to connect to.

It maps the system's errors to messages with remedies. It does not know which program listens.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from .errors import ServingError
from .settings import env_name, option_name

_BACKLOG = 2048


def reachable_host(host: str) -> str:
    """The host to connect to when a server listens on this one, formatted for a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


def check_port(host: str, port: int, purpose: str, field: str) -> None:
    """Raise ServingError when the port cannot be bound. The port is free again afterwards."""
    with _translate_errors(host, port, purpose, field), _bind(_addresses(host, port)[0]):
        pass


def listen(host: str, port: int, purpose: str, field: str) -> list[socket.socket]:
    """A listening socket for each of the host's addresses; ServingError names the reason when one fails."""
    with _translate_errors(host, port, purpose, field), contextlib.ExitStack() as stack:
        sockets = []
        for address in _addresses(host, port):
            sockets.append(stack.enter_context(_bind(address)))
            sockets[-1].listen(_BACKLOG)
        stack.pop_all()
        return sockets


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """(family, address) pairs of the host, without duplicates."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((info[0], info[4]) for info in infos))


def _bind(family_and_address: tuple[socket.AddressFamily, Any]) -> socket.socket:
    family, address = family_and_address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Allow a port whose last connections are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _translate_errors(host: str, port: int, purpose: str, field: str) -> Iterator[None]:
    try:
        yield
    except UnicodeError:
        raise ServingError(f"{host!r} is no host name or address ({purpose})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = f"stop what listens there, or choose another with {option_name(field)} ({env_name(field)})"
            raise ServingError(f"port {port} ({purpose}) on {host} is in use; {remedy}") from None
        if error.errno == errno.EACCES:
            raise ServingError(
                f"port {port} ({purpose}) needs privileges; choose one above 1023 with {option_name(field)}"
            ) from None
        raise ServingError(f"cannot listen on {host}:{port} ({purpose}): {error.strerror}") from None
