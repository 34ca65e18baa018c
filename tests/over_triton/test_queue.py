"""Slots, queue and cancel, on a Triton with four slots and a queue of four."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from tritonlm.contract import QueueFull, TritonLMError
from tritonlm.contract.control import CANCEL

from .caller import Answer, Call, Response, call
from .conftest import QUEUE, SLOTS
from .servers import Server, wait_until

pytestmark = pytest.mark.triton

LONG: dict[str, Any] = {"prompt": "Once", "temperature": 0.0, "max_tokens": 480, "ignore_eos": True}


def occupancy(server: Server) -> tuple[int, int]:
    status = server.status()
    return status["running"], status["waiting"]


def test_requests_beyond_the_queue_are_refused_at_once(small_server: Server) -> None:
    refused: list[tuple[TritonLMError, float]] = []
    served: list[Answer] = []
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(small_server.grpc, request_id=f"r{number}", **LONG)) for number in range(14)]
        for request in calls:
            try:
                served.append(request.read_all())
            except TritonLMError as error:
                refused.append((error, request.last_arrival))
                assert request.is_over()
    assert len(served) == SLOTS + QUEUE
    assert len(refused) == 6
    first_end = min(answer.last.arrived_at for answer in served)
    for error, refused_at in refused:
        assert isinstance(error, QueueFull)
        assert "Exceeds maximum queue size" in error.message
        assert refused_at < first_end, "a refusal must not wait for a slot"
    assert [answer.last.usage.completion for answer in served] == [480] * len(served)


def test_a_cancelled_request_frees_its_slot_at_once(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(call(small_server.grpc, request_id=f"r{n}", **LONG)) for n in range(SLOTS)]
        firsts = [request.next() for request in running]
        waiting = [stack.enter_context(call(small_server.grpc, request_id=f"w{n}", **LONG)) for n in range(2)]
        wait_until(lambda: occupancy(small_server) == (SLOTS, 2), "four run and two wait")

        # The command is answered at once and takes effect before the next step.
        assert small_server.command(CANCEL, "w1") == {"cancelled": 1}
        wait_until(lambda: occupancy(small_server) == (SLOTS, 1), "one waits")
        check_cancelled(waiting[1], completion=0)
        assert small_server.command(CANCEL, "w0") == {"cancelled": 1}
        check_cancelled(waiting[0], completion=0)

        for request, first in zip(running, firsts, strict=True):
            assert small_server.command(CANCEL, request.id) == {"cancelled": 1}
            check_cancelled(request, first)
        # Without waiting: the slot is free before the caller gets the final response.
        assert small_server.holds_nothing()


def check_cancelled(request: Call, *before: Response, completion: int | None = None) -> None:
    answer = request.read_all(*before)
    assert answer.last.finish_reason == "cancelled"
    assert [response.index for response in answer.responses] == list(range(len(answer.responses)))
    assert answer.last.usage.completion < 480
    assert completion is None or answer.last.usage.completion == completion


def test_a_freed_slot_goes_to_the_next_in_the_queue(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(call(small_server.grpc, request_id=f"r{n}", **LONG)) for n in range(SLOTS)]
        wait_until(lambda: occupancy(small_server) == (SLOTS, 0), "four run")
        waiting = stack.enter_context(call(small_server.grpc, request_id="w", **{**LONG, "max_tokens": 5}))
        wait_until(lambda: occupancy(small_server) == (SLOTS, 1), "one waits")
        small_server.command(CANCEL, "r2")
        assert waiting.read_all().last.usage.completion == 5
        for request in running:
            small_server.command(CANCEL, request.id)
            assert request.read_all().last.finish_reason == "cancelled"


def test_cancelling_an_id_cancels_all_its_requests(small_server: Server) -> None:
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(small_server.grpc, request_id="same", **LONG)) for _ in range(2)]
        wait_until(lambda: occupancy(small_server) == (2, 0), "both run")
        assert small_server.command(CANCEL, "same") == {"cancelled": 2}
        for request in calls:
            check_cancelled(request)


def test_a_disconnected_request_can_be_cancelled_by_id(small_server: Server) -> None:
    """Triton does not report a closed stream to the engine: another client must cancel the request by its id."""
    with call(small_server.grpc, request_id="gone", **LONG) as request:
        request.next()
    wait_until(lambda: occupancy(small_server) == (1, 0), "the request runs")
    assert small_server.command(CANCEL, "gone") == {"cancelled": 1}
    wait_until(small_server.holds_nothing, "its slot and blocks are free")
    assert small_server.generate(text_input="a", max_tokens=3).is_success
