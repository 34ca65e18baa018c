"""Places, queue and cancel, on a Triton with four places and a queue of four."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from tritonlm.contract import QueueFull, TritonLMError
from tritonlm.contract.control import CANCEL

from .caller import Answer, Call, Response, call
from .conftest import PLACES, QUEUE
from .servers import Server, wait_until

pytestmark = pytest.mark.triton

LONG: dict[str, Any] = {"prompt": "Once", "temperature": 0.0, "max_tokens": 480, "ignore_eos": True}


def occupancy(server: Server) -> tuple[int, int]:
    status = server.status()
    return status["running"], status["waiting"]


def test_what_the_queue_cannot_hold_is_refused_at_once(small_server: Server) -> None:
    refused: list[tuple[TritonLMError, float]] = []
    served: list[Answer] = []
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(small_server.grpc, request_id=f"r{number}", **LONG)) for number in range(14)]
        for made in calls:
            try:
                served.append(made.answer())
            except TritonLMError as error:
                refused.append((error, made.last_at))
                assert made.is_over()
    assert len(served) == PLACES + QUEUE
    assert len(refused) == 6
    first_end = min(answer.last.at for answer in served)
    for error, at in refused:
        assert isinstance(error, QueueFull)
        assert "Exceeds maximum queue size" in error.message
        assert at < first_end, "a refusal must not wait for a place"
    assert [answer.last.usage.completion for answer in served] == [480] * len(served)


def test_a_cancelled_request_gives_up_its_place_at_once(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(call(small_server.grpc, request_id=f"r{n}", **LONG)) for n in range(PLACES)]
        firsts = [made.next() for made in running]
        waiting = [stack.enter_context(call(small_server.grpc, request_id=f"w{n}", **LONG)) for n in range(2)]
        wait_until(lambda: occupancy(small_server) == (PLACES, 2), "four run and two wait")

        # It is answered at once, and obeyed before the next step.
        assert small_server.command(CANCEL, "w1") == {"cancelled": 1}
        wait_until(lambda: occupancy(small_server) == (PLACES, 1), "one waits")
        check_cancelled(waiting[1], completion=0)
        assert small_server.command(CANCEL, "w0") == {"cancelled": 1}
        check_cancelled(waiting[0], completion=0)

        for made, first in zip(running, firsts, strict=True):
            assert small_server.command(CANCEL, made.id) == {"cancelled": 1}
            check_cancelled(made, first)
        # No waiting here: the slot is free before the caller has its end.
        assert small_server.holds_nothing()


def check_cancelled(made: Call, *before: Response, completion: int | None = None) -> None:
    answer = made.answer(*before)
    assert answer.last.finish_reason == "cancelled"
    assert [response.index for response in answer.responses] == list(range(len(answer.responses)))
    assert answer.last.usage.completion < 480
    assert completion is None or answer.last.usage.completion == completion


def test_a_freed_place_goes_to_the_next_in_the_queue(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(call(small_server.grpc, request_id=f"r{n}", **LONG)) for n in range(PLACES)]
        wait_until(lambda: occupancy(small_server) == (PLACES, 0), "four run")
        waiting = stack.enter_context(call(small_server.grpc, request_id="w", **{**LONG, "max_tokens": 5}))
        wait_until(lambda: occupancy(small_server) == (PLACES, 1), "one waits")
        small_server.command(CANCEL, "r2")
        assert waiting.answer().last.usage.completion == 5
        for made in running:
            small_server.command(CANCEL, made.id)
            assert made.answer().last.finish_reason == "cancelled"


def test_one_id_may_be_used_twice_and_is_cancelled_as_a_whole(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(small_server.grpc, request_id="same", **LONG)) for _ in range(2)]
        wait_until(lambda: occupancy(small_server) == (2, 0), "both run")
        assert small_server.command(CANCEL, "same") == {"cancelled": 2}
        for made in calls:
            check_cancelled(made)


def test_a_caller_that_vanishes_can_be_cancelled_by_another(small_server: Server) -> None:
    """Triton does not tell the engine that a stream was closed: so it says what to cancel, by its id."""
    with call(small_server.grpc, request_id="gone", **LONG) as made:
        made.next()
    wait_until(lambda: occupancy(small_server) == (1, 0), "the request is known")
    assert small_server.command(CANCEL, "gone") == {"cancelled": 1}
    wait_until(small_server.holds_nothing, "its slot and its blocks are free")
    assert small_server.generate(text_input="a", max_tokens=3).is_success
