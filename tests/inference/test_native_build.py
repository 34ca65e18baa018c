"""Compiling the kernels: once, however many engines start, and from the image's libraries where there are any."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine.runners.native import build, isa_variants


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
