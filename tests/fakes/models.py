"""Loads a model of the repository as Triton does (as `model` of a package), with the fake `pb_utils`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fakes import fake_pb_utils

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def load_module(model: str, module: str) -> ModuleType:
    """`module` of `model_repository/<model>/1`."""
    sys.modules["triton_python_backend_utils"] = fake_pb_utils
    package = f"model_{model}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(REPOSITORY / model / "1")]
    return importlib.import_module(f"{package}.{module}")


def start_model(model: str, checkpoint: Path, **parameters: str) -> Any:
    """An initialized TritonPythonModel with this checkpoint."""
    strings = {"checkpoint": checkpoint.name, **parameters}
    config = {"parameters": {name: {"string_value": value} for name, value in strings.items()}}
    started = load_module(model, "model").TritonPythonModel()
    started.initialize(
        {"model_config": json.dumps(config), "model_repository": str(checkpoint.parent), "model_name": model}
    )
    return started
