"""Writes a checkpoint with its linear layers in integers of 4 or 8 bits, in the format of compressed-tensors.

pack-quantized: `weight_packed` int32 (outputs, inputs * bits / 32), `weight_scale` (outputs, groups), `weight_shape`.
`QuantizedSource` reads the same codes and scales. This module knows names and shapes of tensors, not families.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.quantization import is_transposed

from ..quantize import quantize_groups
from ..quantized import Quantized
from ..tensor_source import TensorSource, open_tensors

# Inputs of a scale.
GROUP = 32
# Bytes of a file; a checkpoint above that has several.
_SHARD_BYTES = 4 << 30
_IN_LAYERS = re.compile(r"\.\d+\..*\.weight$")
# The last module of a matrix in a layer that is no linear layer, or chooses the experts.
_NEVER = re.compile(r"norm|^ln|embed|rotary|router|^gate$|^shared_expert_gate$")
_SUFFIX = ".weight"


@dataclass
class Written:
    """What became of the matrices, by name, and the bytes of the files."""

    quantized: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    bytes: int = 0


def write_quantized(
    checkpoint: Checkpoint, folder: Path, bits: int, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Written:
    """Into an existing folder. Numbers that the files hold in blocks become `dtype`, which scales have as well."""
    source, written, shards = open_tensors(checkpoint.folder, torch.float32), Written(), _Shards(folder)
    transposed = is_transposed(checkpoint.config)
    names = sorted(source.names())
    try:
        for number, name in enumerate(names):
            progress(number, len(names))
            if _is_linear(name, source, transposed):
                shards.add(_packed(name.removesuffix(_SUFFIX), _matrix(source, name, bits, dtype, transposed), dtype))
                written.quantized.append(name)
                continue
            if len(source.shape(name)) >= 2:
                written.plain.append(name)
            shards.add({name: _plain(source, name, dtype)})
    finally:
        source.close()
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("compression_config", None)
    config["quantization_config"] = _settings(bits, [name.removesuffix(_SUFFIX) for name in written.plain])
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    written.bytes = shards.finish(mode_of=folder / "config.json")
    return written


def _is_linear(name: str, source: TensorSource, transposed: bool) -> bool:
    shape = source.shape(name)
    if len(shape) != 2 or not _IN_LAYERS.search(name) or _NEVER.search(name.split(".")[-2]):
        return False
    return shape[0 if transposed else 1] % GROUP == 0


def _matrix(source: TensorSource, name: str, bits: int, dtype: torch.dtype, transposed: bool) -> Quantized:
    weight = source.get(name)
    try:
        return quantize_groups(weight.t() if transposed else weight, bits, GROUP, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message}") from None


def _plain(source: TensorSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """As the file has it, unless it has no plain numbers: the source returns those in float32."""
    tensor = source.get(name)
    return tensor.to(dtype) if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor


def _packed(module: str, matrix: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    codes, per_int = (matrix.codes + 2 ** (matrix.bits - 1)).view(torch.uint8), 32 // matrix.bits
    words = codes.int().view(len(codes), -1, per_int) << torch.arange(0, 32, matrix.bits, dtype=torch.int32)
    # float16 does not reach as far as the others.
    scales = matrix.scales.to(dtype)
    return {
        f"{module}.weight_packed": words.sum(2, dtype=torch.int32),
        f"{module}.weight_scale": scales if torch.equal(scales.float(), matrix.scales) else matrix.scales,
        f"{module}.weight_shape": torch.tensor(matrix.codes.shape),
    }


def _settings(bits: int, ignored: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "mse", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": sorted({*ignored, "lm_head"}), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


class _Shards:
    """Files of bounded size, which get their names at the end, with an index where there are several."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tensors = folder, dict[str, torch.Tensor]()
        self._files: list[tuple[Path, list[str]]] = []
        self._bytes = self._total = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._bytes + size > _SHARD_BYTES:
            self._save()
        self._tensors |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += size
        self._total += size

    def finish(self, mode_of: Path) -> int:
        """Their bytes. The library makes files that only their owner may read: they get this file's permissions."""
        self._save()
        count, index = len(self._files), dict[str, str]()
        for number, (file, names) in enumerate(self._files, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            shutil.copymode(mode_of, file)
            file.rename(self._folder / name)
            index |= dict.fromkeys(names, name)
        if count > 1:
            content = {"metadata": {"total_size": self._total}, "weight_map": index}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        return self._total

    def _save(self) -> None:
        file = self._folder / f"{len(self._files)}.part"
        save_file(self._tensors, file, {"format": "pt"})
        self._files.append((file, list(self._tensors)))
        self._tensors, self._bytes = {}, 0
