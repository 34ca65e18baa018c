"""Compiles the kernels once for this machine and keeps the library; without a compiler there is none, and torch serves.

    python -m engine.runners.native.build           for this machine
    python -m engine.runners.native.build FOLDER    each ISA variant, for an image

It knows sources and a compiler, not what the kernels compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import isa_variants as forms

_log = logging.getLogger("tritonlm.engine")
_SOURCES = Path(__file__).parent / "kernels"
_MAIN = "kernels.cpp"
_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_HERE = ("-march=native",)
# What limits torch's instructions limits the kernels' too; they need no speed then, and compile in half the time.
_LIMIT, LIMITED = "ATEN_CPU_CAPABILITY", {"avx2": ("-march=haswell", "-O2"), "default": ("-march=x86-64", "-O2")}
_SECONDS, _LOOK_SECONDS = 300.0, 0.1
# Where the library is kept, and flags that are added: an instruction set that is not to be used (-mno-amx-bf16).
CACHE, FLAGS = "TRITONLM_NATIVE_CACHE", "TRITONLM_NATIVE_FLAGS"


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a word in the log, where they cannot be had."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_made_before() or compiled(_asked())))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        _log.warning("the kernels in C++ cannot be compiled; torch computes in their place: %s", str(said)[-500:])
        return None


def _made_before() -> Path | None:
    """Where they came with an image: the form that suits this processor."""
    if not (folder := os.environ.get(forms.FOLDER)):
        return None
    return forms.choose(processor_flags(), os.environ.get(_LIMIT, "")).file(Path(folder))


def compiled(more: Sequence[str] = ()) -> Path:
    """The library for these sources, this compiler and this processor; made where it is not there yet."""
    compiler = _compiler()
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".hpp"))
    about = [path.read_text(encoding="utf-8") for path in sources]
    flags = (*_HERE, *forms.faster(processor_flags()), *more)
    about += [compiler, str(os.stat(compiler).st_mtime_ns), _processor(), *_FLAGS, *flags]
    file = _cache() / f"kernels-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.with_suffix(".lock")):
            if not file.is_file():
                compile_to(file, flags)
    return file


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Several engines may come at once: one compiles, and the others wait, not longer than that may take."""
    with lock.open("a") as file:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_LOOK_SECONDS)
        yield


def compile_to(file: Path, more: Sequence[str]) -> None:
    """Make this library, with these flags beside the usual ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one piece, or not at all.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [_compiler(), *_FLAGS, *more, str(_SOURCES / _MAIN), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        os.replace(made, file)


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if found is None:
        raise OSError("there is no C++ compiler (g++)")
    return found


def _asked() -> list[str]:
    """Flags that the environment asks for."""
    return [*LIMITED.get(os.environ.get(_LIMIT, ""), ()), *os.environ.get(FLAGS, "").split()]


def _cache() -> Path:
    if named := os.environ.get(CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonlm" / "native"


def processor_flags() -> set[str]:
    return set(_processor().partition(":")[2].split())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print(compiled(_asked()))
    for form in forms.FORMS if arguments else ():
        file = form.file(Path(arguments[0]))
        compile_to(file, form.flags)
        print(file)


if __name__ == "__main__":
    main(sys.argv[1:])
