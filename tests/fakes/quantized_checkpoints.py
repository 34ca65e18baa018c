"""Writes checkpoints whose weights are quantized, in every format that is read, out of a model's plain weights.

The packers follow the formats' descriptions, element by element, and share no code with the reader. Weights are rounded
to the nearest number of random scales, so that every code, zero point and order occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
# Names are those of Llama, and of mixtures like it.
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)(\.experts\.\d+)?\.\w+_proj\.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """The stored tensors by what follows the module's name, and the numbers that they stand for."""

    tensors: Tensors
    weight: torch.Tensor


@dataclass(frozen=True)
class Format:
    config: dict[str, Any]
    store: Callable[[torch.Tensor, np.random.Generator], Stored]
    # What `quantized` returns of it: bits and inputs in a group; None where only numbers can be returned.
    groups: tuple[int, int | None] | None = None
    symmetric: bool = True


def pack(codes: np.ndarray[Any, Any], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """(a, b) → int32 (a, b * bits / 32): element order[k] of each 32 / bits lies at bit k * bits."""
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).astype(np.uint32)
    packed = np.zeros((len(codes), padded.shape[1] // per), np.uint32)
    for k, source in enumerate(order or range(per)):
        packed |= padded[:, source::per] << np.uint32(k * bits)
    return torch.from_numpy(packed.view(np.int32))


def _grouped(
    weight: torch.Tensor, random: np.random.Generator, bits: int, group: int, symmetric: bool, shuffled: bool,
    scale_type: torch.dtype = torch.float16,
) -> tuple[Any, Any, torch.Tensor, Any, torch.Tensor]:  # fmt: skip
    """Codes and zero points from 0, scales, each input's group, and the weight."""
    outputs, inputs = weight.shape
    index = np.arange(inputs) // group
    if shuffled:
        random.shuffle(index)
    half, highest = 2 ** (bits - 1), 2**bits - 1
    zeros = np.full((outputs, inputs // group), half)
    if not symmetric:
        zeros = random.integers(0, highest + 1, zeros.shape)
    scales = torch.from_numpy(random.uniform(0.3, 1.5, zeros.shape) / half).to(scale_type)
    steps = scales[:, index].double().numpy()
    codes = np.clip(np.rint(weight.double().numpy() / steps + zeros[:, index]), 0, highest).astype(int)
    differences = torch.from_numpy(codes - zeros[:, index]).to(scale_type)
    return codes, zeros, scales, index, differences * scales[:, index]


def _awq(weight: torch.Tensor, random: np.random.Generator) -> Stored:
    codes, zeros, scales, _, values = _grouped(weight, random, 4, GROUP, symmetric=False, shuffled=False)
    tensors = {
        ".qweight": pack(codes.T, 4, AWQ_ORDER), ".qzeros": pack(zeros.T, 4, AWQ_ORDER), ".scales": scales.t(),
    }  # fmt: skip
    return Stored(tensors, values)


def _gptq(bits: int, group: int, symmetric: bool, shuffled: bool, offset: int) -> Any:
    def store(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        size = weight.shape[1] if group == -1 else group
        codes, zeros, scales, index, values = _grouped(weight, random, bits, size, symmetric, shuffled)
        tensors = {
            ".qweight": pack(codes, bits).t(), ".qzeros": pack((zeros.T - offset) % 2**bits, bits),
            ".scales": scales.t(), ".g_idx": torch.from_numpy(index).int(),
        }  # fmt: skip
        return Stored(tensors, values)

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": symmetric,
        "checkpoint_format": "gptq" if offset else "gptq_v2",
    }  # fmt: skip
    return Format(config, store, None if shuffled else (bits, None if group == -1 else group), symmetric)


def _compressed(file_format: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": file_format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip


def _packed(bits: int, group: int, symmetric: bool, shuffled: bool = False) -> Any:
    def store(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        size = weight.shape[1] if group == -1 else group
        codes, zeros, scales, index, values = _grouped(weight, random, bits, size, symmetric, shuffled, torch.bfloat16)
        tensors = {
            ".weight_packed": pack(codes, bits), ".weight_scale": scales,
            ".weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        if not symmetric:
            tensors[".weight_zero_point"] = pack(zeros.T, bits).t()
        if shuffled:
            tensors[".weight_g_idx"] = torch.from_numpy(index).int()
        return Stored(tensors, values)

    settings: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    settings |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    config = _compressed("pack-quantized", **settings, actorder="group" if shuffled else None)
    groups = None if shuffled else (bits, None if group == -1 else group)
    return Format(config, store, groups, symmetric)


def _int8(strategy: str, symmetric: bool = True) -> Any:
    def store(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        shape = (len(weight), 1) if strategy == "channel" else (1,)
        scales = torch.from_numpy(random.uniform(0.5, 1.5, shape) / 128).bfloat16()
        zeros = torch.from_numpy(random.integers(1, 20, shape) * (not symmetric)).to(torch.int8)
        codes = (weight / scales.float() + zeros).round().clamp(-128, 127).to(torch.int8)
        tensors = {".weight": codes, ".weight_scale": scales}
        if not symmetric:
            tensors[".weight_zero_point"] = zeros
        return Stored(tensors, (codes.bfloat16() - zeros.bfloat16()) * scales)

    config = _compressed("int-quantized", num_bits=8, type="int", symmetric=symmetric, strategy=strategy)
    return Format(config, store, (8, None), symmetric)


def _float8(config: dict[str, Any], suffix: str, block: tuple[int, int], scale_type: torch.dtype, rounded: bool) -> Any:
    """A scale for each block of outputs and inputs; 0 is all of them. `rounded`: products are of the scales' type."""

    def store(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        outputs, inputs = weight.shape
        rows, columns = block[0] or outputs, block[1] or inputs
        shape = (-(-outputs // rows), -(-inputs // columns))
        scales = torch.from_numpy(random.uniform(0.5, 1.5, shape) / 128).to(scale_type)
        spread = scales.float().repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        values = codes.float() * spread
        tensors = {".weight": codes, suffix: scales if any(block) else scales.view(())}
        return Stored(tensors, values.to(scale_type) if rounded else values)

    return Format(config, store)


FORMATS: dict[str, Format] = {
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": None},
        _awq, (4, GROUP), symmetric=False,
    ),
    "gptq 4 bits": _gptq(4, GROUP, symmetric=True, shuffled=False, offset=1),
    "gptq 4 bits act-order": _gptq(4, GROUP, symmetric=False, shuffled=True, offset=1),
    "gptq 8 bits": _gptq(8, GROUP, symmetric=False, shuffled=False, offset=1),
    "gptq_v2 4 bits": _gptq(4, -1, symmetric=False, shuffled=False, offset=0),
    "W4A16": _packed(4, GROUP, symmetric=True),
    "W4A16 zero points": _packed(4, GROUP, symmetric=False),
    "W4A16 act-order": _packed(4, GROUP, symmetric=True, shuffled=True),
    "W8A16": _packed(8, -1, symmetric=True),
    "W8A8": _int8("channel"),
    "W8A8 tensor": _int8("tensor", symmetric=False),
    "FP8 rows": _float8(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"), ".weight_scale", (1, 0),
        torch.bfloat16, rounded=True,
    ),
    "fp8 blocks": _float8(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3", "activation_scheme": "dynamic"},
        ".weight_scale_inv", (32, 32), torch.float32, rounded=False,
    ),
    "fp8 tensor": _float8(
        {"quant_method": "fp8", "activation_scheme": "static"}, ".weight_scale", (0, 0), torch.float32, rounded=False
    ),
}  # fmt: skip


def quantize_checkpoint(folder: Path, name: str, seed: int = 0, ignore: str = "") -> Tensors:
    """Store the linear layers of a Llama checkpoint in this format; return all tensors as the plain numbers that they
    stand for. `ignore`: a pattern of modules that stay as they are, for compressed-tensors.
    """
    chosen, random = FORMATS[name], np.random.default_rng(seed)
    stored: Tensors = {}
    plain: Tensors = {}
    for tensor_name, tensor in load_file(folder / "model.safetensors").items():
        module = tensor_name.removesuffix(".weight")
        if not LINEAR.fullmatch(tensor_name) or (ignore and re.fullmatch(ignore, module)):
            stored[tensor_name] = plain[tensor_name] = tensor
            continue
        one = chosen.store(tensor.float(), random)
        stored |= {module + suffix: part.contiguous() for suffix, part in one.tensors.items()}
        plain[tensor_name] = one.weight.float()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    left_out = {"ignore": [f"re:{ignore}"]} if ignore else {}
    change_config(folder, quantization_config={**chosen.config, **left_out})
    return plain


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
