"""Whether a gateway may listen on an address: beyond this machine only with a key. It knows no HTTP."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from .keys import KeyFile, KeyRing


def exposure_problem(host: str, keys: Path | None, secret: str | None, allow_anonymous: bool) -> str:
    """Why the gateway may not listen on this host, with the remedy; empty if it may. Without a key only loopback is."""
    ring = KeyRing(KeyFile(keys) if keys else None, secret)
    if ring.problem:
        return ring.problem
    if ring.is_empty and not allow_anonymous and not is_loopback(host):
        return (
            f"listening on {host} without a key would give everybody access; create one with tritonlm keys create "
            "NAME, or set TRITONLM_ALLOW_ANONYMOUS=true (tritonlm gateway: --allow-anonymous)"
        )
    return ""


def is_loopback(host: str) -> bool:
    """Whether every address of this host is a loopback address."""
    try:
        addresses = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(address.is_loopback for address in addresses)
