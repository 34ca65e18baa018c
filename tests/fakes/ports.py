"""Ports that are free now, for commands that check them: on the usual ones a server of the developer may listen."""

from __future__ import annotations

import contextlib
import socket

_OPTIONS = ("port", "http-port", "grpc-port", "metrics-port")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def port_options() -> dict[str, str]:
    """Those of `tritonlm serve`, by option."""
    return dict(zip(_OPTIONS, map(str, free_ports(len(_OPTIONS))), strict=True))


def port_variables() -> dict[str, str]:
    """The same as environment variables."""
    return {f"TRITONLM_{option.upper().replace('-', '_')}": port for option, port in port_options().items()}
