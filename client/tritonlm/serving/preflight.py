"""Checks before Triton starts: ports, shared memory, libraries, checkpoints. Each error names its remedy.

It reads this machine's state and files, and may download checkpoints from the Hub. It starts nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tritonlm.checkpoints.report import problems
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.contract import Checkpoint, CheckpointError

from .backend import PYTHON, STUB, Installation, missing_libraries
from .downloads import downloaded
from .errors import ServingError
from .ports import check_port
from .repository import LanguageModel
from .settings import Settings

SHARED_MEMORY = Path("/dev/shm")
# Each model process starts with 1 MB and grows with its tensors; 64 MB, Docker's default, is too small under load.
MIN_SHARED_MEMORY_MB = 128

_PORTS = {"http_port": "HTTP", "grpc_port": "gRPC", "metrics_port": "metrics"}


def check_ports(settings: Settings) -> None:
    """Check Triton's ports. The placeholder listener already holds the gateway's port."""
    for field, purpose in _PORTS.items():
        check_port(settings.triton_host, getattr(settings, field), purpose, field)


def check_shared_memory(folder: Path = SHARED_MEMORY, needed_mb: int = MIN_SHARED_MEMORY_MB) -> None:
    if not folder.is_dir():
        raise ServingError(f"{folder} does not exist; mount a tmpfs there: Triton's Python models need it")
    free_mb = shutil.disk_usage(folder).free // 2**20
    if free_mb < needed_mb:
        raise ServingError(
            f"{folder} has {free_mb} MB free and {needed_mb} are needed; "
            "enlarge it (in Docker with --shm-size=1g) or remove files from it"
        )


def check_libraries(installation: Installation, backend: Path, environment: dict[str, str]) -> None:
    """Check that the binary and the backend's stub find their shared libraries."""
    for program in (installation.binary, backend / "python" / STUB):
        for library in missing_libraries(program, environment):
            if library.startswith("libpython"):
                raise ServingError(
                    f"{library} is missing: this Python was built without a shared library; "
                    f"install the package libpython{PYTHON} (apt-get install libpython{PYTHON})"
                )
            raise ServingError(f"{program.name} needs {library}, which is missing; run scripts/setup again")


def check_language_models(models: Sequence[LanguageModel], download: bool = True) -> list[LanguageModel]:
    """The models, if their checkpoints can be served; those of the Hub are downloaded, or else left unchecked."""
    return [_checked(model, download) for model in models]


def _checked(model: LanguageModel, download: bool) -> LanguageModel:
    sources = [source for source in model.sources if download or isinstance(source, Path)]
    checkpoints = [Checkpoint(folder_of(downloaded(source))) for source in sources]
    for checkpoint in checkpoints:
        checkpoint.check()
        for problem in problems(checkpoint):
            raise CheckpointError(f"{checkpoint.folder} cannot be served: {problem}")
    return replace(model, has_chats=any(checkpoint.chat_template for checkpoint in checkpoints))
