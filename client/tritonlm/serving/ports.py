"""Addresses and ports: whether one is free, a socket that listens there, and how to call whoever does.

It knows the system's errors and their remedies, not who listens.
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
    """The host to call when a server listens on this one, ready to stand in a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


def check_port(host: str, port: int, purpose: str, field: str) -> None:
    """ServingError says why nobody can listen there; nothing is left behind."""
    with _explained(host, port, purpose, field), _bound(_addresses(host, port)[0]):
        pass


def listen(host: str, port: int, purpose: str, field: str) -> list[socket.socket]:
    """A listening socket for each of the host's addresses; ServingError says why there is none."""
    with _explained(host, port, purpose, field), contextlib.ExitStack() as opened:
        found = []
        for address in _addresses(host, port):
            found.append(opened.enter_context(_bound(address)))
            found[-1].listen(_BACKLOG)
        opened.pop_all()
        return found


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Each once, of whatever kind."""
    return list(
        dict.fromkeys((about[0], about[4]) for about in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    )


def _bound(to: tuple[socket.AddressFamily, Any]) -> socket.socket:
    family, address = to
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last connections are still closing is free for a server.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


@contextlib.contextmanager
def _explained(host: str, port: int, purpose: str, field: str) -> Iterator[None]:
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
