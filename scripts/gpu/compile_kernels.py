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
from engine.runners.gpu.kernels import attention
from stage import Report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Hopper.
_TARGET = GPUTarget("cuda", 90, 32)
# Strides and pointers are multiples of 16 in practice, and triton-lang compiles for that at run time.
_ALIGNED = [["tt.divisibility", 16]]
# Query heads for each KV head, rows of a tile, width, splits.
_TILES = ((1, 1, 64, 8), (1, 64, 64, 1), (4, 1, 128, 16), (4, 32, 128, 1), (2, 64, 256, 1))


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


def compiled(kernel: Any, constants: dict[str, object], warps: int = 4) -> dict[str, object]:
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type_of(name) for name in names}
    aligned = [
        n
        for n, name in enumerate(names)
        if signature[name] in ("*bf16", "*fp32", "*i64") or (name.endswith(("_row", "_head")) and name != "table_row")
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


def _type_of(name: str) -> str:
    if name == "slots":
        return "*i64"
    if name in ("parts", "bests", "totals"):
        return "*fp32"
    if name.startswith("tile_") or name == "tables":
        return "*i32"
    if name in ("scale", "softcap"):
        return "fp32"
    numbers = ("query", "keys", "values", "key_cache", "value_cache", "output")
    return "*bf16" if name in numbers else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", output)}
    return {"registers": found["reg"], "stack_bytes": found["stack"]}
