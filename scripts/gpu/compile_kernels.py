"""Compiles the kernels for a GPU that is not here, and reports what they take of it. It needs triton-lang alone."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from engine.runners.gpu.block_attention import launch_sizes
from engine.runners.gpu.kernels import attention, layers, quantized, rotary
from stage import Report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Hopper.
_TARGET = GPUTarget("cuda", 90, 32)
# Strides and pointers are multiples of 16 in practice, and triton-lang compiles for that at run time.
_ALIGNED = [["tt.divisibility", 16]]
# Query heads for each KV head, rows of a tile, width, splits.
_TILES = ((1, 1, 64, 8), (1, 64, 64, 1), (4, 1, 128, 16), (4, 32, 128, 1), (2, 64, 256, 1))
_NUMBERS = (
    "query", "keys", "values", "key_cache", "value_cache", "output", "weights", "both", "numbers", "bias", "cos", "sin",
    "rotated",
)  # fmt: skip
# Bits, whether codes are floating-point numbers, rows and outputs of a program.
_MATMULS = (
    (4, False, 16, 32), (4, False, 64, 64), (8, False, 16, 32), (8, False, 64, 64), (8, True, 16, 32),
    (8, True, 64, 64),
)  # fmt: skip
# Arguments that are neither whole numbers nor pointers to a number for each tile.
_TYPES = {
    "slots": "*i64", "tables": "*i32", **dict.fromkeys(("parts", "bests", "totals"), "*fp32"),
    **dict.fromkeys(("scale", "softcap", "epsilon"), "fp32"), **dict.fromkeys(_NUMBERS, "*bf16"),
}  # fmt: skip


def report_compiled(report: Report) -> None:
    for repeats, height, width, splits in _TILES:
        block_m = 1 << (max(16, height * repeats) - 1).bit_length()
        block_n, warps = launch_sizes(block_m, width)
        constants = {
            "block_tokens": 16, "repeats": repeats, "width": width, "value_width": width, "padded": width,
            "padded_value": width, "block_m": block_m, "block_n": block_n, "splits": splits, "has_window": True,
            "has_softcap": True,
        }  # fmt: skip
        report(kernel="attend", rows=height, width=width, splits=splits, **compiled(attention.attend, constants, warps))
    constants = {"value_width": 128, "padded_value": 128, "splits": 16, "height": 1}
    report(kernel="combine", **compiled(attention.combine, constants))
    report(kernel="write", **compiled(attention.write, {"width": 128, "value_width": 128, "padded": 128}))
    constants = {
        "heads": 32, "width": 128, "value_width": 128, "rotary": 128, "padded_half": 64, "padded": 128,
    }  # fmt: skip
    report(kernel="rotate_and_write", **compiled(rotary.rotate_and_write, constants, warps=1))
    constants = {"width": 4096, "padded": 4096, "adds_one": False}
    report(kernel="rms_norm", **compiled(layers.rms_norm, constants))
    report(kernel="silu_multiply", **compiled(layers.silu_multiply, {"width": 14_336, "block": 1024}))
    for bits, floats, block_m, block_n in _MATMULS:
        constants = {
            "inputs": 4096, "padded": 4096, "group": 32 if bits == 4 else 4096, "bits": bits, "step": 128,
            "block_m": block_m, "block_n": block_n, "has_bias": False, "floats": floats,
        }  # fmt: skip
        report(kernel="multiply", bits=bits, floats=floats, rows=block_m, **compiled(quantized.multiply, constants))


def compiled(kernel: Any, constants: dict[str, object], warps: int = 4) -> dict[str, object]:
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type_of(kernel, name, constants) for name in names}
    aligned = [
        n
        for n, name in enumerate(names)
        if signature[name] in ("*bf16", "*fp32", "*i64", "*fp16", "*u8", "*i8")
        or (name.endswith(("_row", "_head", "row_stride")) and name != "table_row")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(n,): _ALIGNED for n in aligned},
    )
    began = time.perf_counter()
    result = triton.compile(source, target=_TARGET, options={"num_warps": warps})
    seconds = round(time.perf_counter() - began, 1)
    return {"warps": warps, "shared_bytes": result.metadata.shared, "seconds": seconds, **_usage(result.asm["cubin"])}


def _type_of(kernel: Any, name: str, constants: dict[str, object]) -> str:
    if kernel is quantized.multiply and name in ("codes", "scales"):
        return "*fp16" if name == "scales" else "*u8" if constants["bits"] == 4 or constants["floats"] else "*i8"
    if name == "rows" and kernel is layers.rms_norm:
        return "*bf16"
    return _TYPES.get(name, "*i32" if name.startswith("tile_") else "i32")


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", output)}
    return {"registers": found["reg"], "stack_bytes": found["stack"]}
