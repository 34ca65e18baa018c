"""The compiler of grammars keeps what it has compiled, and refusals; a failure that may pass is not kept."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
from engine.constraints import grammars
from engine.constraints.compiler import Compiled, ConstraintCompiler
from engine.constraints.constraint import Constraint
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract import Checkpoint, EngineFailure, InvalidRequest

GRAMMAR = {"regex": "[0-9]+"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compiler") / "lm")


@pytest.fixture
def compiler(folder: Path) -> ConstraintCompiler:
    return ConstraintCompiler(folder / "tokenizer.json", Checkpoint(folder).vocab_size, {0})


def compiled(compiler: ConstraintCompiler, structured_outputs: dict[str, Any]) -> Compiled:
    results: queue.Queue[Compiled] = queue.Queue()
    compiler.compile(structured_outputs, results.put)
    return results.get(timeout=60)


def failing_once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, failure: Exception) -> None:
    """Let the first call of this function fail."""
    function, failures = getattr(module, name), [failure]

    def fails(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return function(*arguments)

    monkeypatch.setattr(module, name, fails)


def test_a_grammar_whose_compilation_failed_is_compiled_again(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_once(monkeypatch, grammars, "compile_grammar", MemoryError())
    failure = compiled(compiler, GRAMMAR)
    assert isinstance(failure, EngineFailure)
    assert failure.message == "the grammar could not be compiled (MemoryError); send the request again"
    assert isinstance(compiled(compiler, GRAMMAR), Constraint)


@pytest.mark.parametrize("failure", [OSError(24, "Too many open files"), MemoryError()])
def test_a_tokenizer_that_could_not_be_read_is_read_again(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    failing_once(monkeypatch, Path, "read_bytes", failure)
    assert isinstance(compiled(compiler, GRAMMAR), EngineFailure)
    assert isinstance(compiled(compiler, GRAMMAR), Constraint)


def test_a_grammar_that_is_refused_is_not_compiled_again(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [compiled(compiler, {"regex": "("})]
    monkeypatch.delattr(grammars, "compile_grammar")
    refusals.append(compiled(compiler, {"regex": "("}))
    assert [type(refusal) for refusal in refusals] == [InvalidRequest] * 2
