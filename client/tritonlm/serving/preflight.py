"""What can be known to fail before Triton starts, each as one line with its remedy.

It looks at this machine and at files; it starts nothing and leaves nothing behind.
"""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from .backend import PYTHON, STUB, Installation, missing_libraries
from .errors import ServingError
from .repository import LanguageModel, find_language_model
from .settings import Settings, env_name, option_name

SHARED_MEMORY = Path("/dev/shm")
# Each model process starts with 1 MB and grows with its tensors; 64 MB, a container's default, runs out under load.
SHARED_MEMORY_NEEDED_MB = 128

_PORTS = {"http_port": "HTTP", "grpc_port": "gRPC", "metrics_port": "metrics"}


def check_ports(settings: Settings) -> None:
    for field, purpose in _PORTS.items():
        check_port(settings.triton_host, getattr(settings, field), purpose, field)
    if settings.gateway:
        check_port(settings.host, settings.port, "the gateway", "port")


def check_port(host: str, port: int, purpose: str, field: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A port whose last connections are still closing is free for a server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
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


def check_shared_memory(folder: Path = SHARED_MEMORY, needed_mb: int = SHARED_MEMORY_NEEDED_MB) -> None:
    if not folder.is_dir():
        raise ServingError(f"{folder} does not exist, and Triton's Python models talk through it; mount a tmpfs there")
    free_mb = shutil.disk_usage(folder).free // 2**20
    if free_mb < needed_mb:
        raise ServingError(
            f"{folder} has {free_mb} MB free and {needed_mb} are needed; "
            "enlarge it (in Docker with --shm-size=1g) or remove what fills it"
        )


def check_libraries(installation: Installation, backend: Path, environment: dict[str, str]) -> None:
    """The binary and the stub must find their libraries, libpython above all."""
    for program in (installation.binary, backend / "python" / STUB):
        for library in missing_libraries(program, environment):
            if library.startswith("libpython"):
                raise ServingError(
                    f"{library} is missing: this Python was built without a shared library; "
                    f"install the package libpython{PYTHON} (apt-get install libpython{PYTHON})"
                )
            raise ServingError(f"{program.name} needs {library}, which is missing; run scripts/setup again")


def check_language_models(names: Sequence[str], repositories: Sequence[Path]) -> list[LanguageModel]:
    found = [find_language_model(name, repositories) for name in names]
    for model in found:
        for checkpoint in model.checkpoints:
            checkpoint.check()
    return found
