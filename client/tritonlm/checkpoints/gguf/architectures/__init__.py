"""The architectures that are read: for each its config.json, and Hugging Face's names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonlm.contract.gguf_tensors import StoredTensor

from ..header import TensorInfo, printable
from ..model_file import ModelFile
from . import gemma, gpt, llama, qwen
from .architecture import Architecture, Config, Names
from .rules import Piece, Source, plain

ARCHITECTURES: dict[str, Architecture] = {
    **llama.ARCHITECTURES, **gemma.ARCHITECTURES, **qwen.ARCHITECTURES, **gpt.ARCHITECTURES,
}  # fmt: skip
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<name>[a-z0-9_]+)(?P<suffix>\.weight|\.bias)")
# Factors of RoPE's frequencies are in config.json; rot_embd is a table that nobody reads.
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_IGNORED_IN_LAYERS = (".attn_rot_embd.weight", ".attn_rot_embd", ".rope_freqs.weight", ".attention.rotary_emb.inv_freq")


def architecture_of(file: ModelFile) -> Architecture:
    if file.architecture not in ARCHITECTURES:
        raise file.error(
            f"its architecture is {file.architecture[:40]!r}, none of the {len(ARCHITECTURES)} supported ones, such as "
            "llama, qwen3 and gemma3; docs/gguf.md lists them"
        )
    return ARCHITECTURES[file.architecture]


def config_of(file: ModelFile) -> Config:
    """config.json of the model."""
    return architecture_of(file).config(file)


def tensors_of(file: ModelFile, file_names: Mapping[Path, str]) -> dict[str, StoredTensor]:
    """Every tensor that Hugging Face's code has; `file_names` are those in the checkpoint's folder."""
    architecture = architecture_of(file)
    further = architecture.more(file)
    tensors: dict[str, StoredTensor] = {}
    for tensor in file.tensors.values():
        if tensor.name in _IGNORED or tensor.name.endswith(_IGNORED_IN_LAYERS):
            continue
        for name, stored in _pieces(file, architecture, further, tensor, file_names[tensor.file]):
            if name in tensors:
                raise file.error(f"its tensor {printable(tensor.name)} gives {name}, as another one does")
            tensors[name] = stored
    return tensors


def _pieces(
    file: ModelFile, architecture: Architecture, further: Names, tensor: TensorInfo, file_name: str
) -> Iterator[Piece]:
    match = _TENSOR.fullmatch(tensor.name)
    is_in_layer = match is not None and match["layer"] is not None
    names = architecture.layer_names if is_in_layer else architecture.names
    entry = None if match is None else further.get(match["name"], names.get(match["name"]))
    if match is None or entry is None:
        raise file.error(f"its tensor {printable(tensor.name)} is none of the architecture {file.architecture}")
    if is_in_layer and int(match["layer"]) >= file.size("block_count"):
        raise file.error(f"its tensor {printable(tensor.name)} is in none of its {file.size('block_count')} layers")
    name, rule = entry if isinstance(entry, tuple) else (entry, plain)
    prefix = f"{architecture.layers}.{int(match['layer'])}." if is_in_layer else ""
    yield from rule(Source(file, tensor, file_name, prefix + name, match["suffix"]))
