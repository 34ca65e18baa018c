"""The ISA variants of the kernels: a library for each instruction set, one of which is chosen at load time.

Images need them: an image is built on one machine, runs on another and holds no compiler. This module knows compiler
flags and processor flags, not how a library is compiled or loaded.

    python -m engine.runners.native.build FOLDER
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

# The folder of the variants' libraries; the second name is an alias for older images.
LIBRARIES, _LIBRARIES_ALIAS = "TRITONLM_NATIVE_LIBRARIES", "TRITONLM_NATIVE_FORMS"
_V3 = frozenset(("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"))
# All figures with AVX-512 are measured with -O3. For AVX2 it is no faster, and compiles three times as long.
_OPTIMIZE = ("-O3",)
_V4_FLAGS = (*_OPTIMIZE, "-march=x86-64-v4")
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Variant:
    name: str
    compiler_flags: tuple[str, ...]
    required: frozenset[str] = frozenset()

    def file(self, folder: Path) -> Path:
        return folder / f"kernels-{self.name}.so"


# The fastest first.
VARIANTS = (
    Variant(
        "amx", (*_V4_FLAGS, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _V4 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
    ),
    Variant("avx512bf16", (*_V4_FLAGS, "-mavx512bf16", "-mavx512vnni"), _V4 | {"avx512_bf16", "avx512_vnni"}),
    Variant("avx512vnni", (*_V4_FLAGS, "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    Variant("avx512", _V4_FLAGS, _V4),
    Variant("avx_vnni", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    Variant("avx2", ("-march=x86-64-v3",), _V3),
    Variant("plain", ("-march=x86-64",)),
)  # fmt: skip
# ATEN_CPU_CAPABILITY, which limits torch's instructions, also limits the kernels'.
_CAPABILITIES = {"avx2": "avx2", "default": "plain"}


def libraries_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    folder = environment.get(LIBRARIES) or environment.get(_LIBRARIES_ALIAS)
    return Path(folder) if folder else None


def useful(processor: Collection[str], vendor: str) -> frozenset[str]:
    """Those of a processor's flags whose instructions make the kernels faster.

    Intel's processors start a vdpbf16ps, 32 products, every other cycle, and two multiply-adds of 16 float32 in each:
    matmuls of bfloat16 are faster in float32, unless AMX multiplies. AMD's start as many of either in a cycle.
    """
    if vendor == "GenuineIntel" and "amx_bf16" not in processor:
        return frozenset(processor) - {"avx512_bf16"}
    return frozenset(processor)


def optimization_flags(processor: Collection[str], vendor: str) -> tuple[str, ...]:
    """Additional compiler flags that make the kernels faster on this processor, which they are compiled for."""
    slow = frozenset(processor) - useful(processor, vendor)
    return (*(_OPTIMIZE if "avx512f" in processor else ()), *(("-mno-avx512bf16",) if slow else ()))


def choose(processor: Collection[str], capability: str = "") -> Variant:
    """The fastest variant that a processor with these flags runs, and that the capability limit allows."""
    names = [variant.name for variant in VARIANTS]
    allowed = VARIANTS[names.index(_CAPABILITIES[capability]) :] if capability in _CAPABILITIES else VARIANTS
    return next(variant for variant in allowed if variant.required <= set(processor))
