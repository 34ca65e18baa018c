"""The secret of a Triton's control API (load, unload, list, shared memory).

It is generated when Triton starts and stored in a file per port, in a folder that only this user can read. Commands on
the same machine read the file; other machines set TRITONLM_TRITON_SECRET. This module knows header names, and nothing
else of Triton or HTTP.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "TRITONLM_TRITON_SECRET"
# The HTTP header; the gRPC metadata key needs Triton's prefix.
HEADER = "tritonlm-control"
GRPC_HEADER = f"triton-grpc-protocol-{HEADER}"


def new_secret() -> str:
    """The secret for a Triton that is about to start: the one in the environment, or a random one."""
    return os.environ.get(VARIABLE) or secrets.token_urlsafe(24)


def save_secret(secret: str, ports: Sequence[int]) -> None:
    """Write the secret to the file of each port."""
    for port in ports:
        path = _path(port)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        delete_secret([port])
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)


def delete_secret(ports: Sequence[int]) -> None:
    for port in ports:
        with contextlib.suppress(OSError):
            _path(port).unlink()


def secret_for(address: str) -> str:
    """The secret of the Triton at HOST:PORT; empty if none is known."""
    if secret := os.environ.get(VARIABLE):
        return secret
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not _is_local(host):
        return ""
    try:
        path = _path(int(port))
        # A file of another user is ignored.
        return path.read_text(encoding="utf-8") if path.stat().st_uid == os.getuid() else ""
    except OSError:
        return ""


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _path(port: int) -> Path:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    folder = runtime if runtime.is_dir() else Path(tempfile.gettempdir()) / f"tritonlm-{os.getuid()}"
    return folder / "tritonlm" / f"triton-{port}.secret"
