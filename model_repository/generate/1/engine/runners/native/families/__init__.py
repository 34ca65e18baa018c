"""The families that the kernels compute: each writes its program down, from config.json and the names of its tensors.

A family's module has MODEL_TYPES, PREFIX (of its tensors' names) and write().
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from tritonlm.contract import Checkpoint

from ..family_config import FamilyConfig
from ..program import Program
from ..unsupported import Unsupported
from ..weights import WeightPacker

# Each file of this folder is a family's.
_MODULES = [importlib.import_module(f".{module.name}", __name__) for module in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, ModuleType] = {model_type: module for module in _MODULES for model_type in module.MODEL_TYPES}


def prefix_of(checkpoint: Checkpoint) -> str:
    prefix: str = FAMILIES[checkpoint.config["model_type"]].PREFIX
    return prefix


def write(checkpoint: Checkpoint, weights: WeightPacker | None = None, max_context_tokens: int = 0) -> Program:
    """The checkpoint's program; without weights only to find out whether it can be written. Raises Unsupported.

    `max_context_tokens` limits the context; 0: that of the checkpoint."""
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise Unsupported(f"its model_type is none of {', '.join(FAMILIES)}")
    if isinstance(checkpoint.config.get("text_config"), dict):
        raise Unsupported("it is a multimodal model")
    try:
        program: Program = FAMILIES[model_type].write(FamilyConfig(checkpoint, max_context_tokens), weights)
    except ArithmeticError as error:
        raise Unsupported(f"its config.json has a number that cannot be computed with: {error}") from None
    return program
