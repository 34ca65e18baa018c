"""How a command runs a module of the engine in a process of its own, and finds its code."""

from __future__ import annotations

import os
import sys

from tritonlm.serving import paths


def engine_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"engine.{module}", *arguments]


def engine_environment() -> dict[str, str]:
    code = paths.model_repository() / "generate" / "1"
    search = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": search}
