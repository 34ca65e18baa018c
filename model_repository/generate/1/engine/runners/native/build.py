"""Compiles the kernels once for this machine and caches the library. Without a compiler, torch computes instead.

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

from . import isa_variants

_log = logging.getLogger("tritonlm.engine")
_SOURCES = Path(__file__).parent / "kernels"
_MAIN = "kernels.cpp"
_COMPILER_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_THIS_MACHINE = ("-march=native",)
# ATEN_CPU_CAPABILITY limits torch's instructions, and the kernels' too. Speed does not matter then, and -O1 compiles in
# 0.6 times the time of -O2.
_CAPABILITY = "ATEN_CPU_CAPABILITY"
CAPABILITY_FLAGS = {"avx2": ("-march=haswell", "-O1"), "default": ("-march=x86-64", "-O1")}
_COMPILE_TIMEOUT, _LOCK_POLL_SECONDS = 300.0, 0.1
# The library's folder, and additional compiler flags, for example to exclude an instruction set (-mno-amx-bf16).
CACHE, FLAGS = "TRITONLM_NATIVE_CACHE", "TRITONLM_NATIVE_FLAGS"


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The kernels' library, or None, with a warning in the log, if it cannot be compiled or loaded."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_prebuilt_library() or compile_library(_environment_flags())))
    except (OSError, subprocess.SubprocessError) as error:
        message = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        _log.warning("the C++ kernels cannot be compiled; torch computes instead: %s", str(message)[-500:])
        return None


def _prebuilt_library() -> Path | None:
    """The image's library for this processor, where an image has prebuilt ones."""
    if (folder := isa_variants.libraries_folder()) is None:
        return None
    processor = isa_variants.useful(processor_flags(), processor_vendor())
    return isa_variants.choose(processor, os.environ.get(_CAPABILITY, "")).file(folder)


def compile_library(extra_flags: Sequence[str] = ()) -> Path:
    """The library for these sources, this compiler and this processor, compiled if the cache does not hold it."""
    compiler = _compiler()
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".hpp"))
    key = [path.read_text(encoding="utf-8") for path in sources]
    flags = flags_for_this_machine(extra_flags)
    key += [compiler, str(os.stat(compiler).st_mtime_ns), *sorted(processor_flags()), *_COMPILER_FLAGS, *flags]
    file = _cache() / f"kernels-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(file.with_suffix(".lock")):
            if not file.is_file():
                compile_to(file, flags)
    return file


def flags_for_this_machine(extra_flags: Sequence[str]) -> tuple[str, ...]:
    """The compiler flags for this processor, without the instruction sets that the additional flags exclude."""
    processor = processor_flags() - ({"amx_bf16"} if "-mno-amx-bf16" in extra_flags else set())
    return (*_THIS_MACHINE, *isa_variants.optimization_flags(processor, processor_vendor()), *extra_flags)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Of several engines that start at once, one compiles. The others wait, at most until a compilation times out."""
    with path.open("a") as file:
        deadline = time.monotonic() + _COMPILE_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_LOCK_POLL_SECONDS)
        yield


def compile_to(file: Path, flags: Sequence[str]) -> None:
    """Compile the library to this file, with these additional flags."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The file appears complete: it is compiled in a temporary folder and renamed.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        output = Path(folder) / file.name
        command = [_compiler(), *_COMPILER_FLAGS, *flags, str(_SOURCES / _MAIN), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT)
        os.replace(output, file)


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler is installed; install g++ or set CXX")
    return compiler


def _environment_flags() -> list[str]:
    return [*CAPABILITY_FLAGS.get(os.environ.get(_CAPABILITY, ""), ()), *os.environ.get(FLAGS, "").split()]


def _cache() -> Path:
    if folder := os.environ.get(CACHE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonlm" / "native"


def processor_flags() -> set[str]:
    return set(_processor_line("flags", "Features").split())


def processor_vendor() -> str:
    return _processor_line("vendor_id").strip()


def _processor_line(*names: str) -> str:
    """What /proc/cpuinfo says of the first processor under one of these names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2] for line in lines if line.startswith(names)), "")
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> None:
    try:
        if not arguments:
            print(compile_library(_environment_flags()))
        for variant in isa_variants.VARIANTS if arguments else ():
            file = variant.file(Path(arguments[0]))
            compile_to(file, variant.compiler_flags)
            print(file)
    except subprocess.CalledProcessError as error:
        sys.exit(f"the kernels do not compile:\n{error.stderr[-2000:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
