"""How the kernels are compiled: once, however many want them. What they compute is tested elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine.runners.native import build


def test_of_engines_that_come_at_once_one_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, runs = tmp_path / "g++", tmp_path / "runs"
    # What is made goes to its last argument.
    compiler.write_text(f'#!/bin/sh\necho one >>{runs}\nsleep 0.5\nfor made; do :; done\necho done >"$made"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as engines:
        (made,) = set(engines.map(lambda _: build.compiled(), range(4)))
    assert made.read_text() == "done\n"
    assert runs.read_text() == "one\n"
