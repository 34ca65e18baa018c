"""The kernels for machines that are not known yet: a library for each level of instructions, chosen at the load.

For images, which are built on one machine, run on another, and hold no compiler. It knows levels and a processor's
flags.

    python -m engine.runners.native.build FOLDER
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Where such libraries lie.
FOLDER = "TRITONLM_NATIVE_FORMS"
_V3 = frozenset(("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"))
# All figures with AVX-512 were measured so. Without it, this takes three times as long to compile and gives nothing.
_FASTER = ("-O3",)
_V4_FLAGS = (*_FASTER, "-march=x86-64-v4")
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Form:
    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    def file(self, folder: Path) -> Path:
        return folder / f"kernels-{self.name}.so"


# The best first.
FORMS = (
    Form(
        "amx", (*_V4_FLAGS, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _V4 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
    ),
    Form("avx512bf16", (*_V4_FLAGS, "-mavx512bf16", "-mavx512vnni"), _V4 | {"avx512_bf16", "avx512_vnni"}),
    Form("avx512", _V4_FLAGS, _V4),
    Form("avx2", ("-march=x86-64-v3",), _V3),
    Form("plain", ("-march=x86-64",)),
)  # fmt: skip
# What limits torch's instructions limits the kernels' too.
_LIMITS = {"avx2": "avx2", "default": "plain"}


def faster(processor: Collection[str]) -> tuple[str, ...]:
    """Flags that pay on a processor with these."""
    return _FASTER if "avx512f" in processor else ()


def choose(processor: Collection[str], limit: str = "") -> Form:
    """The best that a processor with these flags can run, and that the limit allows."""
    names = [form.name for form in FORMS]
    allowed = FORMS[names.index(_LIMITS[limit]) :] if limit in _LIMITS else FORMS
    return next(form for form in allowed if form.needs <= set(processor))
