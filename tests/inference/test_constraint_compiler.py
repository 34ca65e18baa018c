"""The compiler of grammars keeps what it has compiled, and refusals; a failure that may pass is not kept."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine.constraints import grammars
from engine.constraints.compiler import Compiled, ConstraintCompiler
from engine.constraints.constraint import Constraint
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract import Checkpoint, EngineFailure, InvalidRequest

from .structured_outputs import compiled

GRAMMAR = {"regex": "[0-9]+"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compiler") / "lm")


@pytest.fixture
def compiler(folder: Path) -> ConstraintCompiler:
    return ConstraintCompiler(folder / "tokenizer.json", Checkpoint(folder).vocab_size, {0})


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


class Caller:
    """What waits for a grammar, such as a request with its prompt."""

    def __init__(self) -> None:
        self.results: queue.Queue[Compiled] = queue.Queue()

    def put(self, compiled: Compiled) -> None:
        self.results.put(compiled)


@pytest.mark.parametrize("sent", [GRAMMAR, {"regex": "("}], ids=["compiled", "refused"])
def test_a_kept_grammar_keeps_none_of_its_callers(compiler: ConstraintCompiler, sent: dict[str, Any]) -> None:
    callers = [Caller() for _ in range(3)]
    dead = [weakref.ref(caller) for caller in callers]
    for caller in callers:
        compiler.compile(sent, caller.put)
    for caller in callers:
        caller.results.get(timeout=60)
    # A thread of the compiler may hold the last caller until it ends.
    compiler.close()
    del caller, callers
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3


def test_callers_of_one_grammar_wait_for_one_compilation(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_grammar, all_wait, calls = grammars.compile_grammar, threading.Event(), []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        assert all_wait.wait(60)
        return compile_grammar(*arguments)

    monkeypatch.setattr(grammars, "compile_grammar", counted)
    callers = [Caller() for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda caller: compiler.compile(GRAMMAR, caller.put), callers))
    all_wait.set()
    results = [caller.results.get(timeout=60) for caller in callers]
    assert len(set(map(id, results))) == len(callers)
    assert all(isinstance(result, Constraint) for result in results)
    assert len(calls) == 1


def test_a_closed_compiler_ends_what_waits(compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_grammar, closed = grammars.compile_grammar, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert closed.wait(60)
        return compile_grammar(*arguments)

    monkeypatch.setattr(grammars, "compile_grammar", slow)
    callers = [Caller() for _ in range(5)]
    for number, caller in enumerate(callers):
        compiler.compile({"regex": str(number)}, caller.put)
    closing = threading.Thread(target=compiler.close)
    closing.start()
    # Those that no thread has begun are refused before the others end.
    assert isinstance(callers[-1].results.get(timeout=60), EngineFailure)
    closed.set()
    closing.join()
    assert all(caller.results.get(timeout=60) for caller in callers[:-1])
