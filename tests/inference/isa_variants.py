"""The kernels compiled for several ISA variants, each without one more instruction set.

A background thread compiles them one after the other, before the tests need them.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engine.runners.native import build
from engine.runners.native import isa_variants as engine_variants

# "avx2" is any processor of the last ten years, "plain" any x86-64. With -O1 they compile sooner, and run as fast here.
_NO_AMX, _BF16 = ("-mno-amx-bf16", "-O1"), ("-mavx512bf16",)


def _emulation(name: str) -> tuple[str, ...]:
    """Flags for instructions in C++. They name the header's content: a change compiles anew."""
    header = Path(__file__).with_name(f"{name}_emulation.hpp")
    return (f"-DTRITONLM_{name.upper()}_EMULATION={zlib.crc32(header.read_bytes())}", "-include", str(header))


_PROCESSOR = build.processor_flags()
# Where products of bfloat16 are slow, the kernels leave them out, unless a variant's flags say otherwise.
_MULTIPLIES_BF16 = "avx512_bf16" in engine_variants.useful(_PROCESSOR, build.processor_vendor())
# The code for AVX-512 and AVX-VNNI on processors that have AVX2. Most of the time is the compiler's, which takes a
# quarter of it without optimization.
_EMULATES_AVX512 = "avx2" in _PROCESSOR and "avx512f" not in _PROCESSOR
_EMULATED = (*build.CAPABILITY_FLAGS["avx2"], "-O0", *_emulation("avx512"))
_AVX512_EMULATED = (*_EMULATED, "-DTRITONLM_EMULATES_AVX512")
_BF16_EMULATED = (*_AVX512_EMULATED, "-DTRITONLM_EMULATES_BF16")
# The code for AMX on processors without it.
_AMX_EMULATED = (*(_BF16_EMULATED if _EMULATES_AVX512 else ("-O1", *_BF16)), *_emulation("amx"))
_ALL_VARIANTS = {
    "all": (), "no_amx": (*_NO_AMX, *_BF16), "no_bf16": (*_NO_AMX, "-mno-avx512bf16", "-mno-avx512vnni"),
    "amx_emulated": _AMX_EMULATED, "avx_vnni": (*build.CAPABILITY_FLAGS["avx2"], "-mavxvnni"),
    "avx2": build.CAPABILITY_FLAGS["avx2"], "plain": build.CAPABILITY_FLAGS["default"],
    "avx512_emulated": _BF16_EMULATED, "avx512_no_bf16_emulated": _AVX512_EMULATED,
    "avx_vnni_emulated": (*_EMULATED, "-DTRITONLM_EMULATES_AVX_VNNI"),
}  # fmt: skip
# A variant is the same as "all" if the processor has none of the instruction sets that it excludes. Every processor
# with AMX has AVX512-BF16, and the kernels for AMX use it.
_EXISTS = {
    "no_amx": "amx_bf16" in _PROCESSOR or ("avx512_bf16" in _PROCESSOR and not _MULTIPLIES_BF16),
    "no_bf16": bool({"avx512_bf16", "avx512_vnni"} & _PROCESSOR),
    "amx_emulated": _EMULATES_AVX512 or ("avx512_bf16" in _PROCESSOR and "amx_bf16" not in _PROCESSOR),
    "avx2": bool({"avx512f", "avx_vnni"} & _PROCESSOR), "avx_vnni": "avx_vnni" in _PROCESSOR,
    "avx512_emulated": _EMULATES_AVX512, "avx512_no_bf16_emulated": _EMULATES_AVX512,
    "avx_vnni_emulated": "avx2" in _PROCESSOR and not {"avx_vnni", "avx512f"} & _PROCESSOR,
}  # fmt: skip
KERNEL_VARIANTS = {name: flags for name, flags in _ALL_VARIANTS.items() if _EXISTS.get(name, True)}
# Emulated AVX-512 is slow: it is for tests of kernels and of one model, the others are for all models.
EMULATED = [name for name, flags in KERNEL_VARIANTS.items() if set(_EMULATED) <= set(flags)]
VARIANTS = {name: flags for name, flags in KERNEL_VARIANTS.items() if name not in EMULATED}
# "avx_vnni" is "avx2" with other products of bytes; so is "no_bf16" "all", where that has no products of bfloat16.
_OTHER_BYTES = ("avx_vnni", *(() if _MULTIPLIES_BF16 else ("no_bf16",)))
# For models whose weights and keys are floats.
FLOAT_VARIANTS = {name: flags for name, flags in VARIANTS.items() if name not in _OTHER_BYTES}


def existing(*names: str) -> list[str]:
    """Those of these variants that are not the same as another one here."""
    return [name for name in names if name in KERNEL_VARIANTS]


@functools.cache
def _compilations() -> dict[str, Future[Path]]:
    # One thread: the tests that run meanwhile need a core too.
    pool = ThreadPoolExecutor(1)
    return {name: pool.submit(build.compile_library, flags) for name, flags in KERNEL_VARIANTS.items()}


# One object for each variant: what the kernels measure for a library is measured once.
@functools.cache
def library_of(variant: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_compilations()[variant].result()))
