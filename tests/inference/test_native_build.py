"""Compiling the kernels: once, however many engines start, and from the image's libraries where there are any."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine.runners.native import build, isa_variants

KERNELS = Path(build.__file__).parent / "kernels"


def test_engines_that_start_at_once_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, runs = tmp_path / "g++", tmp_path / "runs"
    # The last argument is the output file.
    compiler.write_text(f'#!/bin/sh\necho one >>{runs}\nsleep 0.5\nfor file; do :; done\necho done >"$file"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as engines:
        (library,) = set(engines.map(lambda _: build.compile_library(), range(4)))
    assert library.read_text() == "done\n"
    assert runs.read_text() == "one\n"


@pytest.mark.parametrize("name", ["TRITONLM_NATIVE_LIBRARIES", "TRITONLM_NATIVE_FORMS"])
def test_the_folder_of_prebuilt_libraries_has_an_alias(name: str) -> None:
    assert isa_variants.libraries_folder({name: "/opt/native"}) == Path("/opt/native")
    assert isa_variants.libraries_folder({"TRITONLM_NATIVE_LIBRARIES": "/new", name: "/new"}) == Path("/new")
    assert isa_variants.libraries_folder({}) is None


@pytest.mark.parametrize("processor", ["sandybridge", "ivybridge", "bdver2"])
def test_kernels_compile_for_processors_before_avx2(processor: str) -> None:
    """They have AVX, some of them F16C and FMA too."""
    command = ["g++", "-std=c++17", f"-march={processor}", "-fsyntax-only", str(KERNELS / "kernels.cpp")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr


def test_the_emulations_have_every_instruction_of_the_kernels() -> None:
    """Where the processor has them itself, the emulations are not compiled: an instruction is missed elsewhere."""
    instructions = re.compile(r"\b(?:_mm512|_tile)_[a-z0-9_]+")
    used = {name for source in KERNELS.iterdir() for name in instructions.findall(source.read_text())}
    emulations = Path(__file__).parent.glob("*_emulation.hpp")
    defined = {line.split("(")[0] for file in emulations for line in re.findall(r"#define (\S+)", file.read_text())}
    assert "_mm512_fmadd_ps" in used
    assert "_tile_loadd" in used
    assert used <= defined, sorted(used - defined)


BF16 = {"avx512f", "avx512_bf16"}


@pytest.mark.parametrize(
    ("flags", "vendor", "compiler_flags"),
    [
        (BF16, "GenuineIntel", ("-O3", "-mno-avx512bf16")),
        (BF16 | {"amx_bf16"}, "GenuineIntel", ("-O3",)),
        (BF16, "AuthenticAMD", ("-O3",)),
        ({"avx512f"}, "GenuineIntel", ("-O3",)),
        ({"avx2"}, "GenuineIntel", ()),
    ],
)
def test_slow_products_of_bfloat16_are_left_out(flags: set[str], vendor: str, compiler_flags: tuple[str, ...]) -> None:
    assert isa_variants.optimization_flags(flags, vendor) == compiler_flags
    is_slow = "-mno-avx512bf16" in compiler_flags
    assert ("avx512_bf16" in isa_variants.useful(flags, vendor)) == ("avx512_bf16" in flags and not is_slow)


def test_without_amx_the_slow_products_are_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "processor_flags", lambda: {*BF16, "amx_bf16"})
    monkeypatch.setattr(build, "processor_vendor", lambda: "GenuineIntel")
    assert "-mno-avx512bf16" not in build.flags_for_this_machine([])
    assert "-mno-avx512bf16" in build.flags_for_this_machine(["-mno-amx-bf16"])
    # A flag that switches them on again comes last.
    assert build.flags_for_this_machine(["-mno-amx-bf16", "-mavx512bf16"])[-1] == "-mavx512bf16"
