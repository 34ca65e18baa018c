"""Packages of agents that do not fit beside the environment's own: each set lies in a folder that goes before them.

They are installed once with pip, into .cache. The environment stays as it is; it has what these packages share with it.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"
_INSTALL_SECONDS = 240
# Pinned versions, for all supported versions of Python.
PACKAGES: dict[str, tuple[str, ...]] = {
    # openai-agents needs websockets before 17, and langchain a newer langchain-core.
    "agents": (
        "PyJWT==2.15.1", "certifi==2026.10.19.post1", "cffi==2.1.1", "cryptography==50.0.2", "griffelib==2.3.1",
        "langchain==1.4.10", "langchain-core==1.8.3", "langgraph==1.2.24", "langgraph-checkpoint==4.3.2",
        "langgraph-prebuilt==1.1.3", "langgraph-sdk==0.4.14", "mcp==2.3.0", "mcp-types==2.3.0",
        "openai-agents==0.24.0", "ormsgpack==1.13.1", "pycparser==3.12", "websockets==16.1.1",
    ),
    # instructor needs jiter before 0.15, which the current openai does not accept, and rich before 15.
    "instructor": ("instructor==1.17.0", "jiter==0.14.0", "openai==3.3.0", "rich==14.3.4"),
}  # fmt: skip


class Unavailable(Exception):
    """The packages are not available here; the message says why."""


def sdk_folder(name: str, cache: Path = CACHE) -> Path:
    """The folder of this set of packages; installed first if it is missing, or has other versions."""
    wanted = "\n".join(PACKAGES[name])
    folder = cache / f"sdk-{name}"
    stamp = folder / "versions.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"sdk-{name}.lock").open("w") as lock:
        # Another test run may be installing it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            with tempfile.TemporaryDirectory(dir=cache) as work:
                _install(PACKAGES[name], Path(work) / "packages")
                (Path(work) / "packages" / stamp.name).write_text(wanted, encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                (Path(work) / "packages").rename(folder)
    return folder


def _install(packages: tuple[str, ...], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--retries", "1"]
    command += ["--disable-pip-version-check", "--target", str(target), *packages]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"installing {packages[0]} and others takes more than {_INSTALL_SECONDS} s") from None
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise Unavailable(f"the packages cannot be installed: {lines[-1] if lines else 'no message from pip'}")
