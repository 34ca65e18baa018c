"""The watch fails a call in bounded time when its process dies, hangs or loses it, and not when it is only slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from tritonlm.client.transport import watch
from tritonlm.client.transport.watch import Watch, WatchedCall
from tritonlm.contract import Broken, EngineFailure, TritonLMError, Unavailable


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"CHECK": 0.01, "SLOW": 0.05, "SILENT": 0.02, "ARRIVAL": 0.3}.items():
        monkeypatch.setattr(watch, f"_{name}_SECONDS", seconds)


async def healthy() -> dict[str, float]:
    return {"age_seconds": 100.0}


async def no_call_is_known(_: Sequence[str]) -> list[str]:
    return []


async def every_call_is_known(request_ids: Sequence[str]) -> list[str]:
    return list(request_ids)


def failure_of_silent_call(
    ping: Callable[[], Awaitable[dict[str, Any]]] = healthy,
    filter_known: Callable[[Sequence[str]], Awaitable[Sequence[str]]] = every_call_is_known,
    arrived: bool = False,
    seconds: float = 0.25,
) -> TritonLMError | None:
    """The error with which one silent call fails within this time."""

    async def run() -> TritonLMError | None:
        failures: list[TritonLMError] = []
        call, calls = WatchedCall("r", failures.append), Watch("lm", ping, filter_known)
        if arrived:
            call.note_response()
        calls.add(call)
        await asyncio.sleep(seconds)
        calls.remove(call)
        await asyncio.sleep(0.05)
        assert calls._task is not None
        assert calls._task.done() or ping is not healthy, "the task ends when no call is left"
        calls.close()
        return failures[0] if failures else None

    return asyncio.run(run())


def test_a_call_known_to_the_engine_does_not_fail() -> None:
    assert failure_of_silent_call() is None
    assert failure_of_silent_call(arrived=True) is None


def test_a_call_that_the_engine_has_lost_fails() -> None:
    assert isinstance(failure_of_silent_call(filter_known=no_call_is_known, arrived=True), Broken)


def test_a_call_has_time_to_reach_the_engine() -> None:
    assert failure_of_silent_call(filter_known=no_call_is_known, seconds=0.2) is None
    assert isinstance(failure_of_silent_call(filter_known=no_call_is_known, seconds=0.6), Broken)


@pytest.mark.parametrize("error", [Broken("died"), Unavailable("gone")])
def test_calls_of_a_dead_process_fail_at_once(error: TritonLMError) -> None:
    async def ping() -> dict[str, Any]:
        raise error

    failure = failure_of_silent_call(ping)
    assert isinstance(failure, Broken)
    assert failure.message == error.message


def test_a_call_fails_when_its_engine_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ping() -> dict[str, Any]:
        return {"age_seconds": 0.05}

    monkeypatch.setattr(watch, "_YOUNGER_SECONDS", 0.1)
    assert failure_of_silent_call(ping, seconds=0.1) is None
    failure = failure_of_silent_call(ping, seconds=0.3)
    assert isinstance(failure, Broken)
    assert "was replaced" in failure.message


def test_calls_of_a_hanging_process_fail() -> None:
    async def ping() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    failure = failure_of_silent_call(ping)
    assert isinstance(failure, Broken)
    assert "does not answer any more" in failure.message


def test_one_slow_ping_or_a_refused_ping_fails_no_call() -> None:
    slow = iter([0.06] + [0.0] * 1000)

    async def slow_once() -> dict[str, Any]:
        await asyncio.sleep(next(slow))
        return {}

    async def refuse() -> dict[str, Any]:
        raise EngineFailure("refused")

    assert failure_of_silent_call(slow_once) is None
    assert failure_of_silent_call(refuse) is None
