"""The secret that opens a Triton's control API (load, unload, list, shared memory): made at its start, kept by port.

It lies in a folder of this user's alone, so that commands on the same machine find it; from elsewhere it comes by
TRITONLM_TRITON_SECRET. It knows neither Triton nor HTTP beyond the names of headers.
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
# To Triton over HTTP; over gRPC it wants a prefix.
HEADER = "tritonlm-control"
GRPC_HEADER = f"triton-grpc-protocol-{HEADER}"


def made() -> str:
    """For a Triton that is about to start: the one that it is to share with callers elsewhere, or a new one."""
    return os.environ.get(VARIABLE) or secrets.token_urlsafe(24)


def keep(secret: str, ports: Sequence[int]) -> None:
    """To be found by these ports."""
    for port in ports:
        file = _file(port)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        forget([port])
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
            written.write(secret)


def forget(ports: Sequence[int]) -> None:
    for port in ports:
        with contextlib.suppress(OSError):
            _file(port).unlink()


def of(address: str) -> str:
    """The secret of the Triton at HOST:PORT; empty where none is known."""
    if given := os.environ.get(VARIABLE):
        return given
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not _is_here(host):
        return ""
    try:
        file = _file(int(port))
        # Somebody else's file is none of ours.
        return file.read_text(encoding="utf-8") if file.stat().st_uid == os.getuid() else ""
    except OSError:
        return ""


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _file(port: int) -> Path:
    own = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    folder = own if own.is_dir() else Path(tempfile.gettempdir()) / f"tritonlm-{os.getuid()}"
    return folder / "tritonlm" / f"triton-{port}.secret"
