"""Locates Triton's binary, from the wheel `nvidia-pytriton` or NVIDIA's image, and assembles its Python backend.

`main` assembles the backend at setup. This module starts no Triton.
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
# The folder of a Triton that does not come from the wheel: /opt/tritonserver in NVIDIA's images.
HOME = "TRITONLM_TRITON_HOME"
# The folder of the assembled backend; default: in the cache.
BACKENDS = "TRITONLM_BACKENDS"
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """Triton's files. `is_complete`: a full installation that already has a Python backend."""

    root: Path
    libraries: Path
    version: str
    is_complete: bool = False

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def library_path(self) -> list[Path]:
        """Folders for LD_LIBRARY_PATH: Triton's libraries, and the folder of this Python's libpython."""
        python_libraries = sysconfig.get_config_var("LIBDIR")
        return [self.libraries] + ([Path(python_libraries)] if python_libraries else [])


def find_installation() -> Installation:
    if home := os.environ.get(HOME):
        root = Path(home)
        if not (root / "bin" / "tritonserver").is_file():
            raise ServingError(f"{HOME}={home} contains no Triton (bin/tritonserver)")
        return Installation(root, root / "lib", f"from {HOME}", is_complete=True)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServingError("Triton is not installed; run scripts/setup, or pip install 'tritonlm[server]'")
    package = Path(spec.origin).parent
    version = importlib.metadata.version("nvidia-pytriton")
    return Installation(package / "tritonserver", package.parent / "nvidia_pytriton.libs", version)


def assemble(installation: Installation) -> Path:
    """Assemble the Python backend for this Python version if needed; return Triton's --backend-directory."""
    if installation.is_complete:
        return installation.root / "backends"
    directory = Path(os.environ.get(BACKENDS) or paths.cache() / "triton-backends")
    target = directory / "python"
    stamp = f"nvidia-pytriton {installation.version}, Python {PYTHON}\n"
    if (target / "STAMP").is_file() and (target / "STAMP").read_text(encoding="utf-8") == stamp:
        return directory
    stub = installation.root / "python_backend_stubs" / PYTHON / STUB
    if not stub.is_file():
        raise ServingError(f"nvidia-pytriton {installation.version} has no Python backend for Python {PYTHON}")
    directory.mkdir(parents=True, exist_ok=True)
    # Built in a temporary folder and moved into place, so that an interrupted copy is never used.
    with tempfile.TemporaryDirectory(dir=directory.parent) as staging:
        backend = Path(staging) / "python"
        source = installation.root / "backends" / "python"
        shutil.copytree(source, backend, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(stub, backend / STUB)
        (backend / "STAMP").write_text(stamp, encoding="utf-8")
        if target.exists():
            target.rename(Path(staging) / "old")
        backend.rename(target)
    return directory


def missing_libraries(program: Path, environment: dict[str, str]) -> list[str]:
    """Shared libraries of this program that the loader does not find, according to ldd."""
    try:
        listing = subprocess.run(
            ["ldd", str(program)], env=environment, capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except FileNotFoundError:  # no ldd on this machine: a missing library shows when the program starts
        return []
    return [line.split()[0] for line in listing.splitlines() if line.rstrip().endswith("not found")]


def main() -> None:
    """Assemble the backend and print its folder; scripts/setup calls this."""
    try:
        print(assemble(find_installation()))
    except ServingError as error:
        sys.exit(f"error: {error}")
