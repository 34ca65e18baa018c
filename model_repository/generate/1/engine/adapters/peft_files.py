"""Reads an adapter from a folder in PEFT's format: adapter_config.json and adapter_model.safetensors.

The files are read as a whole, so that a change meanwhile neither mixes two versions of a file nor ends the process.
Everything that cannot be computed is refused by name. It does not know the base: a runner checks the layers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tritonlm.contract import CheckpointError
from tritonlm.contract.safetensors_header import read_header

from .lora import LoraAdapter, LowRank
from .peft_settings import CONFIG, PeftSettings

WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tensors of other kinds of adapters, and what they stand for.
_OTHER_KINDS = {
    "lora_embedding_": "low-rank matrices of an embedding",
    "lora_magnitude_vector": "DoRA",
    ".bias": "biases",
    "modules_to_save": "a whole layer",
}


def read_adapter(name: str, folder: Path, max_rank: int) -> LoraAdapter:
    """Raises CheckpointError, in one sentence with the file and the remedy."""
    config, weights = (_read(folder, file) for file in FILES)
    settings = PeftSettings(folder, config, max_rank)
    identity = hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()
    tensors = _tensors(folder / WEIGHTS, weights)
    return LoraAdapter(name, identity, dict(_layers(folder / WEIGHTS, settings, tensors)))


def stored_numbers(folder: Path) -> int:
    """How many numbers the header of the weights' file announces; 0 if it cannot be read: `read_adapter` says why."""
    try:
        return sum(math.prod(tensor.shape) for tensor in read_header(folder / WEIGHTS).values())
    except CheckpointError:
        return 0


def _read(folder: Path, name: str) -> bytes:
    try:
        if not folder.is_dir():
            raise CheckpointError(f"adapter folder {folder} does not exist")
        return (folder / name).read_bytes()
    except FileNotFoundError:
        pickled = name == WEIGHTS and any((folder / other).exists() for other in _PICKLED)
        reason = "; pickled weights are not loaded: save it with safe_serialization=True" if pickled else ""
        raise CheckpointError(f"adapter folder {folder} has no {name}{reason}") from None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None


def _tensors(file: Path, content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load  # noqa: PLC0415

    try:
        return load(content)
    except Exception as error:  # the library's own errors, and those of torch for sizes that it cannot make
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{file} is not a valid safetensors file; copy it again ({reason})") from None


def _layers(file: Path, settings: PeftSettings, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, LowRank]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key) if key.isprintable() else None
        if match is None:
            kind = next((kind for part, kind in _OTHER_KINDS.items() if part in key), "no matrix of LoRA")
            raise CheckpointError(f"{file} holds {key[:200]!r}: {kind}, which is not supported; merge it into its base")
        if match["part"] in parts.setdefault(match["layer"], {}):
            raise CheckpointError(f"{file} holds two matrices {match['part']} of {match['layer'][:200]}; save it again")
        parts[match["layer"]][match["part"]] = tensor
    if not parts:
        raise CheckpointError(f"{file} holds no matrices; save the adapter again")
    # A file's tensors come in any order.
    for layer, matrices in sorted(parts.items()):
        if missing := {"A", "B"} - matrices.keys():
            raise CheckpointError(f"{file} lacks lora_{min(missing)} of {layer[:200]}; save the adapter again")
        settings.check_target(layer)
        yield layer, _low_rank(file, layer, settings, matrices["A"], matrices["B"])


def _low_rank(file: Path, layer: str, settings: PeftSettings, a: torch.Tensor, b: torch.Tensor) -> LowRank:
    rank = settings.rank(layer)
    for part, matrix, axis in (("A", a, 0), ("B", b, 1)):
        name = f"lora_{part} of {layer[:200]}"
        if matrix.dtype not in _DTYPES:
            raise CheckpointError(f"{file}: {name} is {matrix.dtype}; save it in float32, bfloat16 or float16")
        if matrix.dim() != 2 or 0 in matrix.shape or matrix.shape[axis] != rank:
            raise CheckpointError(f"{file}: {name} has the shape {tuple(matrix.shape)}, and {CONFIG} says rank {rank}")
        if not bool(matrix.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite; train the adapter again")
    return LowRank(a, b.float() * settings.scaling(layer))
