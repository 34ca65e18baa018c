"""A running engine ends requests that are cancelled or closed, whatever else is unfinished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from engine import engine as engine_module
from engine import intake as intake_module
from engine.constraints.compiler import Compiled, ConstraintCompiler
from engine.engine import Engine
from tritonlm.contract import EngineFailure

from .harness import Collected, make_engine, save_model, submit

SECONDS = 20
GRAMMAR = {"regex": "[0-9]+"}


class SlowCompiler:
    """Compiles no grammar before it is told to fail."""

    def __init__(self) -> None:
        self.fail: Callable[[], None] = lambda: None

    def compile(self, _: Any, done: Callable[[Compiled], None]) -> None:
        self.fail = lambda: done(EngineFailure("the grammar could not be compiled"))


@pytest.fixture
def compiler() -> SlowCompiler:
    return SlowCompiler()


@pytest.fixture
def engine(tmp_path: Path, compiler: SlowCompiler) -> Engine:
    """An engine with this compiler of grammars."""
    made = make_engine(save_model("gpt2", tmp_path))
    return Engine(made.runner, made.config, lambda ids, _: "", (), constraints=cast(ConstraintCompiler, compiler))


def close_in_a_step(engine: Engine) -> tuple[Collected, Collected]:
    """Begin to close the engine in the first step of one request, while another one waits for its grammar."""
    began, closed, forward = threading.Event(), threading.Event(), engine.runner.forward

    def watched(plan: Any) -> Any:
        began.set()
        assert closed.wait(SECONDS)
        return forward(plan)

    engine.runner.forward = watched  # type: ignore[method-assign]
    engine.start()
    running = submit(engine, [5, 6, 7], max_tokens=200, ignore_eos=True)
    preparing = submit(engine, [5, 6, 7], structured_outputs=GRAMMAR)
    assert began.wait(SECONDS)
    engine._intake.close()
    closed.set()
    return running, preparing


def test_running_requests_end_before_what_others_wait_for_is_ready(
    engine: Engine,
    compiler: SlowCompiler,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[[Callable[[], bool]], None],
) -> None:
    monkeypatch.setattr(engine_module, "_PREPARED_SECONDS", SECONDS)
    running, preparing = close_in_a_step(engine)
    wait_for(lambda: any(running.ends))
    assert running.final.finish_reason == "cancelled"
    assert not preparing.ends
    compiler.fail()
    engine.close()
    assert isinstance(preparing.error, EngineFailure)


def test_a_request_whose_grammar_does_not_become_ready_is_cancelled(
    engine: Engine, compiler: SlowCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_PREPARED_SECONDS", 0.0)
    requests = close_in_a_step(engine)
    engine.close()
    assert engine.has_ended
    assert [request.final.finish_reason for request in requests] == ["cancelled"] * 2
    compiler.fail()
    assert engine.in_flight == 0


def test_an_idle_engine_ends_a_cancelled_request_that_waits_for_its_grammar(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    monkeypatch.setattr(intake_module, "_IDLE_SECONDS", 3600.0)
    idle, changed = threading.Event(), engine._intake._changed
    wait = changed.wait

    def watched(seconds: float | None = None) -> bool:
        if seconds == 3600:
            idle.set()
        return wait(seconds)

    monkeypatch.setattr(changed, "wait", watched)
    engine.start()
    assert idle.wait(SECONDS)
    preparing = submit(engine, [5, 6, 7], request_id="waiting", structured_outputs=GRAMMAR)
    assert engine.cancel("waiting") == 1
    wait_for(lambda: any(preparing.ends))
    assert preparing.final.finish_reason == "cancelled"
    engine.close()
