"""What can be known to fail before Triton starts, each as one line with its remedy.

It looks at this machine and at files; it starts nothing and leaves nothing behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from .backend import PYTHON, STUB, Installation, missing_libraries
from .errors import ServingError
from .ports import check_port
from .repository import LanguageModel, find_language_model
from .settings import Settings

SHARED_MEMORY = Path("/dev/shm")
# Each model process starts with 1 MB and grows with its tensors; 64 MB, a container's default, runs out under load.
SHARED_MEMORY_NEEDED_MB = 128

_PORTS = {"http_port": "HTTP", "grpc_port": "gRPC", "metrics_port": "metrics"}


def check_ports(settings: Settings) -> None:
    """Triton's; the gateway's is held from the beginning."""
    for field, purpose in _PORTS.items():
        check_port(settings.triton_host, getattr(settings, field), purpose, field)


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
