"""The admission queue: its limits, the callers' shares, the time to retry after, and closing."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.fake_transport import LM, FakeTransport
from hypothesis import given
from hypothesis import strategies as st
from tritonlm.contract import Draining, QueueFull, QueueTimeout
from tritonlm.gateway.limits import admission
from tritonlm.gateway.limits.admission import AdmissionQueue

from .conftest import running_gateway

BODY = {"model": LM, "prompt": "a", "max_tokens": 40}


@given(
    max_requests=st.integers(1, 20),
    max_running=st.integers(1, 6),
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 30)), max_size=80),
)
def test_the_limits_hold_and_free_slots_go_to_the_caller_with_the_fewest(
    max_requests: int, max_running: int, moves: list[tuple[bool, str, int]]
) -> None:
    async def play() -> None:
        queue = AdmissionQueue(max_requests, max_running, 60)
        waiting: list[tuple[str, asyncio.Task[None]]] = []
        running: list[str] = []
        for enters, caller, number in moves:
            if enters:
                waiting.append((caller, asyncio.ensure_future(queue.enter(caller, is_known=False))))
            elif number % 3 == 0 and waiting:
                # A waiting caller leaves.
                waiting[number % len(waiting)][1].cancel()
            elif running:
                before = Counter(running)
                gone = running.pop(number % len(running))
                queued = {name for name, task in waiting if not task.done()}
                queue.leave(gone)
                before[gone] -= 1
                chosen = [name for name in queue.running if queue.running[name] > before[name]]
                if chosen:
                    assert before[chosen[0]] == min(before[name] for name in queued)
            for _ in range(8):
                # Let the tasks that got a slot, or were cancelled, run.
                await asyncio.sleep(0)
            for name, task in [entry for entry in waiting if entry[1].done()]:
                waiting.remove((name, task))
                if not task.cancelled() and task.exception() is None:
                    running.append(name)
            assert Counter(running) == queue.running
            assert queue.running.total() <= max_running
            assert queue.total <= max_requests
            # Nobody waits while a slot is free.
            assert queue.waiting == len(waiting)
            assert not waiting or queue.running.total() == max_running
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
        assert queue.waiting == 0

    asyncio.run(play())


def test_one_caller_cannot_occupy_the_whole_queue() -> None:
    async def fill() -> None:
        queue = AdmissionQueue(10, 10, 60)
        for _ in range(8):
            await queue.enter("greedy")
        with pytest.raises(QueueFull, match="of your requests"):
            await queue.enter("greedy")
        await queue.enter("modest")
        # An address may stand for many callers.
        elsewhere = AdmissionQueue(10, 10, 60)
        for _ in range(10):
            await elsewhere.enter("10.0.0.1", is_known=False)

    asyncio.run(fill())


def test_prompt_tokens_are_limited_except_for_a_single_request() -> None:
    async def fill() -> None:
        queue = AdmissionQueue(10, 1, 0.01, max_tokens=100)
        await queue.enter("a", tokens=500)
        with pytest.raises(QueueFull, match="prompt tokens"):
            await queue.enter("b", tokens=1)
        queue.leave("a", tokens=500)
        await queue.enter("a", tokens=60)
        with pytest.raises(QueueTimeout):
            await queue.enter("b", tokens=40)
        assert queue.tokens == 60
        queue.leave("a", tokens=60)
        assert queue.tokens == 0

    asyncio.run(fill())


def test_prompt_tokens_count_as_they_arrive() -> None:
    queue = AdmissionQueue(1, 1, 60, max_tokens=100)
    with queue.arriving("a", tokens=90) as count:
        assert (queue.tokens, queue.total) == (0, 0), "nothing has arrived yet"
        for arrived in (30, 60):
            count(arrived)
            assert queue.tokens == arrived
        with pytest.raises(QueueFull, match="prompt tokens"), queue.arriving("b", tokens=50):
            pass
        with queue.arriving("c") as count_other:
            count_other(30)
            with pytest.raises(QueueFull, match="prompt tokens"):
                count_other(50)
        assert queue.tokens == 60
    assert queue.tokens == 0
    with queue.arriving("a") as count:
        # Alone, as long as it likes.
        count(500)
        queue.close()
        with pytest.raises(Draining):
            count(600)
    assert queue.tokens == 0


def test_requests_with_too_many_prompt_tokens_together_are_refused() -> None:
    transport = FakeTransport()
    transport.held_from = 0
    with running_gateway(transport, max_prompt_tokens=100) as gateway, ThreadPoolExecutor(2) as pool:
        first = pool.submit(gateway.post, "/v1/completions", **BODY)
        gateway.wait_until(lambda: bool(gateway.transport.running))
        refused = gateway.post("/v1/completions", **{**BODY, "prompt": "a" * 400})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        # A body without a length counts, too.
        chunks = (part.encode() for part in json.dumps({**BODY, "prompt": "a" * 400}).partition(" "))
        headers = {"content-type": "application/json"}
        assert gateway.http.post("/v1/completions", content=chunks, headers=headers).status_code == 429
        transport.held_from = None
        assert first.result().status_code == 200
        assert gateway.post("/v1/completions", **{**BODY, "prompt": "a" * 400}).status_code == 200


def test_a_request_that_waits_too_long_is_refused() -> None:
    async def wait() -> None:
        queue = AdmissionQueue(10, 1, 0.01)
        await queue.enter("a")
        with pytest.raises(QueueTimeout) as error:
            await queue.enter("b")
        assert error.value.retry_after
        assert queue.waiting == 0

    asyncio.run(wait())


def test_retry_after_follows_the_rate_at_which_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock)
    queue = AdmissionQueue(4, 4, 60)
    queue.running["a"] = 6
    assert queue.retry_after() == 1, "no request has ended yet"
    for _ in range(2):
        queue.leave("a")
    assert queue.total == queue.max_requests
    # Two ended in ten seconds: one every five seconds.
    assert queue.retry_after() == math.ceil(10 / 2)
    clock += 60
    assert queue.retry_after() == 1


def test_a_closed_queue_refuses_new_requests() -> None:
    async def close() -> None:
        queue = AdmissionQueue(4, 1, 60)
        await queue.enter("a")
        late = asyncio.ensure_future(queue.enter("b"))
        await asyncio.sleep(0)
        queue.close()
        with pytest.raises(Draining):
            await queue.enter("c")
        queue.leave("a")
        await late
        queue.leave("b")
        assert queue.total == 0

    asyncio.run(close())


def test_requests_above_the_limit_are_refused_before_triton_is_called() -> None:
    transport = FakeTransport()
    transport.held_from = 0
    with running_gateway(transport, max_requests=4) as gateway, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(gateway.post, "/v1/completions", **BODY) for _ in range(12)]
        gateway.wait_until(lambda: sum(answer.done() for answer in answers) == 8)
        refused = [answer.result() for answer in answers if answer.done()]
        transport.held_from = None
        assert {answer.result().status_code for answer in answers if answer.result() not in refused} == {200}
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert len(transport.calls) == 4
        # Listing models is not limited.
        assert gateway.http.get("/v1/models").status_code == 200


def test_a_stalled_reader_is_disconnected_and_does_not_block_others() -> None:
    with running_gateway(FakeTransport(), reader_seconds=0.5) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        body = json.dumps({**BODY, "prompt": "x" * 15_000, "echo": True, "n": 64, "stream": True, "max_tokens": 500})
        stalled = []
        for _ in range(4):
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            stalled.append(connection)
        gateway.wait_until(lambda: len(gateway.transport.calls) == 4 * 64)
        assert gateway.post("/v1/completions", **BODY).status_code == 200
        gateway.wait_until(lambda: not gateway.transport.running)
        for connection in stalled:
            connection.close()
