"""Calls whose processes die, hang or forget them fail in bounded time; those that are only slow do not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from tritonlm.client.transport import watch
from tritonlm.client.transport.watch import Watch, Watched
from tritonlm.contract import Broken, EngineFailure, TritonLMError, Unavailable


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.01, "SLOW": 0.05, "SILENT": 0.02, "UNSEEN": 0.3}.items():
        monkeypatch.setattr(watch, f"_{name}_SECONDS", seconds)


async def well() -> dict[str, float]:
    return {"age_seconds": 100.0}


async def nobody(_: Sequence[str]) -> list[str]:
    return []


async def everybody(asked: Sequence[str]) -> list[str]:
    return list(asked)


def outcome(
    ask: Callable[[], Awaitable[dict[str, Any]]] = well,
    known: Callable[[Sequence[str]], Awaitable[Sequence[str]]] = everybody,
    arrived: bool = False,
    seconds: float = 0.25,
) -> TritonLMError | None:
    """What becomes of one silent call in this time."""

    async def run() -> TritonLMError | None:
        failures: list[TritonLMError] = []
        call, looks = Watched("r", failures.append), Watch("lm", ask, known)
        if arrived:
            call.hear()
        looks.enter(call)
        await asyncio.sleep(seconds)
        looks.leave(call)
        await asyncio.sleep(0.05)
        assert looks._task is not None
        assert looks._task.done() or ask is not well, "nobody is left to look after"
        looks.close()
        return failures[0] if failures else None

    return asyncio.run(run())


def test_a_call_that_the_engine_has_is_left_alone() -> None:
    assert outcome() is None
    assert outcome(arrived=True) is None


def test_a_call_that_the_engine_has_had_and_has_not_any_more_is_lost() -> None:
    assert isinstance(outcome(known=nobody, arrived=True), Broken)


def test_a_call_that_has_not_come_to_the_engine_yet_is_given_time() -> None:
    assert outcome(known=nobody, seconds=0.2) is None
    assert isinstance(outcome(known=nobody, seconds=0.6), Broken)


@pytest.mark.parametrize("error", [Broken("died"), Unavailable("gone")])
def test_a_process_that_has_died_breaks_its_calls_at_once(error: TritonLMError) -> None:
    async def ask() -> dict[str, Any]:
        raise error

    found = outcome(ask)
    assert isinstance(found, Broken)
    assert found.message == error.message


def test_an_engine_younger_than_a_call_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> dict[str, Any]:
        return {"age_seconds": 0.05}

    monkeypatch.setattr(watch, "_YOUNGER_SECONDS", 0.1)
    assert outcome(ask, seconds=0.1) is None
    found = outcome(ask, seconds=0.3)
    assert isinstance(found, Broken)
    assert "was replaced" in found.message


def test_a_process_that_does_not_answer_hangs() -> None:
    async def ask() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    found = outcome(ask)
    assert isinstance(found, Broken)
    assert "does not answer any more" in found.message


def test_one_slow_answer_or_a_refusal_breaks_nothing() -> None:
    slow = iter([0.06] + [0.0] * 1000)

    async def slow_once() -> dict[str, Any]:
        await asyncio.sleep(next(slow))
        return {}

    async def refuse() -> dict[str, Any]:
        raise EngineFailure("asked too much")

    assert outcome(slow_once) is None
    assert outcome(refuse) is None
