"""The kernels in several forms, each without one more set of instructions; compiled one after another, ahead of their
tests.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engine.runners.native import build

# The last two are processors of the last ten years, and any that there is. But for this machine's own they need no
# speed, and compile in half the time.
_NO_AMX = ("-mno-amx-bf16", "-O2")
_ALL_FORMS = {
    "all": (), "no_amx": _NO_AMX, "no_bf16": (*_NO_AMX, "-mno-avx512bf16", "-mno-avx512vnni"),
    "avx2": build.LIMITED["avx2"], "plain": build.LIMITED["default"],
}  # fmt: skip
# Where a processor has none of these anyway, the form is that of "all".
_GOES_WITHOUT = {"no_amx": {"amx_bf16"}, "no_bf16": {"avx512_bf16", "avx512_vnni"}}
_HERE = build.processor_flags()
FORMS = {name: flags for name, flags in _ALL_FORMS.items() if name not in _GOES_WITHOUT or _GOES_WITHOUT[name] & _HERE}


@functools.cache
def _compiling() -> dict[str, Future[Path]]:
    # The other tests want a core, too.
    pool = ThreadPoolExecutor(1)
    return {name: pool.submit(build.compiled, flags) for name, flags in FORMS.items()}


def library_of(form: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_compiling()[form].result()))
