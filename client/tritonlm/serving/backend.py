"""Triton as the wheel `nvidia-pytriton` brings it, or as its own image does: where the binary is, and a Python backend.

`python -m tritonlm.serving.backend` assembles it. It does not start anything.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import paths
from .errors import ServingError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Triton's own folder, where it does not come from the wheel: /opt/tritonserver in NVIDIA's images.
HOME = "TRITONLM_TRITON_HOME"
# Where the assembled backend lies or shall lie; default: in the cache.
ASSEMBLED = "TRITONLM_BACKENDS"
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """Triton's files: inside site-packages, or in a folder of its own, where they are complete."""

    root: Path
    libraries: Path
    version: str
    is_complete: bool = False

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def library_path(self) -> list[Path]:
        """Where the loader has to look: the wheel's libraries, and this Python's own (its libpython)."""
        found = sysconfig.get_config_var("LIBDIR")
        return [self.libraries] + ([Path(found)] if found else [])


def find_installation() -> Installation:
    if own := os.environ.get(HOME):
        root = Path(own)
        if not (root / "bin" / "tritonserver").is_file():
            raise ServingError(f"{HOME}={own} holds no Triton (bin/tritonserver)")
        return Installation(root, root / "lib", "its own", is_complete=True)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServingError("Triton is not installed; run scripts/setup, or pip install 'tritonlm[server]'")
    package = Path(spec.origin).parent
    version = importlib.metadata.version("nvidia-pytriton")
    return Installation(package / "tritonserver", package.parent / "nvidia_pytriton.libs", version)


def assemble(installation: Installation) -> Path:
    """Put the Python backend of this Python's version together, once; return Triton's --backend-directory."""
    if installation.is_complete:
        return installation.root / "backends"
    directory = Path(os.environ.get(ASSEMBLED) or paths.cache() / "triton-backends")
    target = directory / "python"
    stamp = f"nvidia-pytriton {installation.version}, Python {PYTHON}\n"
    if (target / "STAMP").is_file() and (target / "STAMP").read_text(encoding="utf-8") == stamp:
        return directory
    stub = installation.root / "python_backend_stubs" / PYTHON / STUB
    if not stub.is_file():
        raise ServingError(f"nvidia-pytriton {installation.version} has no Python backend for Python {PYTHON}")
    directory.mkdir(parents=True, exist_ok=True)
    # Made aside and moved into place, so that an interrupted copy is never taken for a backend.
    with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
        made = Path(aside) / "python"
        shutil.copytree(installation.root / "backends" / "python", made, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(stub, made / STUB)
        (made / "STAMP").write_text(stamp, encoding="utf-8")
        if target.exists():
            target.rename(Path(aside) / "old")
        made.rename(target)
    return directory


def missing_libraries(program: Path, environment: dict[str, str]) -> list[str]:
    """The shared libraries that the loader would not find for this program."""
    try:
        listing = subprocess.run(
            ["ldd", str(program)], env=environment, capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except FileNotFoundError:  # no ldd on this machine: the program's own start will tell
        return []
    return [line.split()[0] for line in listing.splitlines() if line.rstrip().endswith("not found")]


def main() -> None:
    """Assemble the backend and name its folder: for set-up."""
    try:
        print(assemble(find_installation()))
    except ServingError as error:
        sys.exit(f"error: {error}")
