"""The kind of processor that a figure was seen on.

A kind is the best instruction set that the kernels use here. A restriction by environment variables belongs to its
name: `avx512_bf16 (AMX off)`. The same restriction goes to the rivals. This module does not know what is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The best first: the kind, and its name in a restriction.
_ISA = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2", "plain": ""}
KINDS = tuple(_ISA)[:-1]
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
# The processor's flag, where its name differs from the kind's.
_PROCESSOR_FLAGS = {"avx512": "avx512f"}
# A flag of TRITONLM_NATIVE_FLAGS, and the kinds that it excludes; the others leave AMX in.
_EXCLUDED = {
    "-mno-amx-bf16": {"amx_bf16"}, "-mno-avx512bf16": {"avx512_bf16"}, "-mno-avx512f": {"avx512", "avx512_bf16"},
    "-mno-avx2": {"avx2", "avx512", "avx512_bf16"},
}  # fmt: skip
# ATEN_CPU_CAPABILITY limits torch and the kernels.
_ALLOWED = {"avx2": {"avx2", "plain"}, "default": {"plain"}}
# What restricts the rivals to a kind: torch's matmuls and vector code, and a compiler.
_ONEDNN = {"avx512_bf16": "AVX512_CORE_BF16", "avx512": "AVX512_CORE_VNNI", "avx2": "AVX2", "plain": "SSE41"}
_COMPILER = {
    "avx512_bf16": ("-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"),
    "avx512": ("-mno-avx512bf16", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"),
    "avx2": ("-mno-avx512f", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"),
    "plain": ("-mno-avx", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"),
}


@dataclass(frozen=True)
class Kind:
    """`isa` is what the kernels may use; `hardware` is the best that the processor has."""

    isa: str
    hardware: str
    vendor: str = ""

    @property
    def name(self) -> str:
        if not self.is_restricted:
            return f"{self.isa} (Intel)" if self._is_slow_at_bfloat16 else self.isa
        kinds = list(_ISA)
        return f"{self.isa} ({_ISA[kinds[kinds.index(self.isa) - 1]]} off)"

    @property
    def is_restricted(self) -> bool:
        return self.isa != self.hardware

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether a matmul of bfloat16 is faster than one of float32. Without the instructions torch's goes one number
        after the other, for minutes; those of Intel's AVX512-BF16 are slow. The kernels compute in float32 then."""
        return self.isa in ("amx_bf16", "avx512_bf16") and not self._is_slow_at_bfloat16

    @property
    def _is_slow_at_bfloat16(self) -> bool:
        return self.isa == "avx512_bf16" and self.vendor == INTEL

    @property
    def rival_environment(self) -> dict[str, str]:
        """What restricts torch's code in a rival alike; its own compiled kernels stay unrestricted."""
        if not self.is_restricted:
            return {}
        capability = {"avx2": "avx2", "plain": "default"}.get(self.isa)
        return {"ONEDNN_MAX_CPU_ISA": _ONEDNN[self.isa], **({"ATEN_CPU_CAPABILITY": capability} if capability else {})}

    @property
    def rival_compiler_flags(self) -> tuple[str, ...]:
        return _COMPILER[self.isa] if self.is_restricted else ()


def kind(
    flags: Collection[str] | None = None, environment: Mapping[str, str] = os.environ, vendor: str | None = None
) -> Kind:
    """The kind of a processor with these flags and of this vendor, this one's by default."""
    flags = _processor_flags() if flags is None else flags
    vendor = vendor_of_this_machine() if vendor is None else vendor
    present = [isa for isa in _ISA if _PROCESSOR_FLAGS.get(isa, isa) in flags or isa == "plain"]
    native_flags = environment.get("TRITONLM_NATIVE_FLAGS", "").split()
    excluded = set().union(*(_EXCLUDED.get(flag, set()) for flag in native_flags))
    left = [isa for isa in present if isa not in excluded]
    if left[0] == "amx_bf16" and excluded:
        raise SystemExit("TRITONLM_NATIVE_FLAGS leaves AMX on: add -mno-amx-bf16")
    allowed = _ALLOWED.get(environment.get("ATEN_CPU_CAPABILITY", ""), set(_ISA))
    return Kind(next(isa for isa in left if isa in allowed), present[0], vendor)


def _processor_flags() -> set[str]:
    return set(_processor_line("flags").split())


def vendor_of_this_machine() -> str:
    return _processor_line("vendor_id").strip()


def _processor_line(name: str) -> str:
    match = re.search(rf"^{name}\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else ""


def machine() -> str:
    """The machine and the date of the measurement."""
    return f"{os.cpu_count()} cores ({kind().name}), {time.strftime('%Y-%m-%d')}"


def commit() -> str:
    """The commit that is measured; "+" stands for changes that it does not contain. Empty outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "model_repository", "client")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
