"""How many are inside at once: the bound, the shares, the time to come back; and what a signal to stop does."""

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
from tritonlm.gateway import admission
from tritonlm.gateway.admission import Admission

from .conftest import running_gateway

BODY = {"model": LM, "prompt": "a", "max_tokens": 40}


@given(
    limit=st.integers(1, 20),
    places=st.integers(1, 6),
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 30)), max_size=80),
)
def test_the_bounds_hold_nobody_is_forgotten_and_places_go_to_who_has_fewest(
    limit: int, places: int, moves: list[tuple[bool, str, int]]
) -> None:
    async def play() -> None:
        inside = Admission(limit, places, 60)
        waiting: list[tuple[str, asyncio.Task[None]]] = []
        running: list[str] = []
        for enters, caller, number in moves:
            if enters:
                waiting.append((caller, asyncio.ensure_future(inside.enter(caller, is_known=False))))
            elif number % 3 == 0 and waiting:
                # Somebody who waits leaves.
                waiting[number % len(waiting)][1].cancel()
            elif running:
                before = Counter(running)
                gone = running.pop(number % len(running))
                queued = {name for name, task in waiting if not task.done()}
                inside.leave(gone)
                before[gone] -= 1
                chosen = [name for name in inside.running if inside.running[name] > before[name]]
                if chosen:
                    assert before[chosen[0]] == min(before[name] for name in queued)
            for _ in range(8):
                # Whoever got a turn, or left, is told.
                await asyncio.sleep(0)
            for name, task in [entry for entry in waiting if entry[1].done()]:
                waiting.remove((name, task))
                if not task.cancelled() and task.exception() is None:
                    running.append(name)
            assert Counter(running) == inside.running
            assert inside.running.total() <= places
            assert inside.total <= limit
            # Nobody waits while there is a place.
            assert inside.waiting == len(waiting)
            assert not waiting or inside.running.total() == places
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
        assert inside.waiting == 0

    asyncio.run(play())


def test_one_caller_does_not_fill_the_house() -> None:
    async def fill() -> None:
        inside = Admission(10, 10, 60)
        for _ in range(8):
            await inside.enter("greedy")
        with pytest.raises(QueueFull, match="of yours"):
            await inside.enter("greedy")
        await inside.enter("modest")
        # Behind one address may be many.
        elsewhere = Admission(10, 10, 60)
        for _ in range(10):
            await elsewhere.enter("10.0.0.1", is_known=False)

    asyncio.run(fill())


def test_tokens_are_bounded_and_a_prompt_alone_is_let_in_whatever_its_size() -> None:
    async def fill() -> None:
        inside = Admission(10, 1, 0.01, tokens=100)
        await inside.enter("a", tokens=500)
        with pytest.raises(QueueFull, match="tokens of prompts"):
            await inside.enter("b", tokens=1)
        inside.leave("a", tokens=500)
        await inside.enter("a", tokens=60)
        with pytest.raises(QueueTimeout):
            await inside.enter("b", tokens=40)
        assert inside.tokens == 60
        inside.leave("a", tokens=60)
        assert inside.tokens == 0

    asyncio.run(fill())


def test_prompts_that_are_too_many_together_are_refused() -> None:
    with running_gateway(FakeTransport(pause=0.2), max_prompt_tokens=100) as gateway, ThreadPoolExecutor(2) as crowd:
        first = crowd.submit(gateway.post, "/v1/completions", **BODY)
        gateway.wait_until(lambda: bool(gateway.transport.running))
        refused = gateway.post("/v1/completions", **{**BODY, "prompt": "a" * 400})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert first.result().status_code == 200
        assert gateway.post("/v1/completions", **{**BODY, "prompt": "a" * 400}).status_code == 200


def test_who_waits_too_long_is_sent_away() -> None:
    async def wait() -> None:
        inside = Admission(10, 1, 0.01)
        await inside.enter("a")
        with pytest.raises(QueueTimeout) as told:
            await inside.enter("b")
        assert told.value.retry_after
        assert inside.waiting == 0

    asyncio.run(wait())


def test_the_time_to_come_back_is_that_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock)
    inside = Admission(4, 4, 60)
    inside.running["a"] = 6
    assert inside.retry_after() == 1, "nothing is known yet"
    for _ in range(2):
        inside.leave("a")
    assert inside.total == inside.limit
    # Two in ten seconds: one in five.
    assert inside.retry_after() == math.ceil(10 / 2)
    clock += 60
    assert inside.retry_after() == 1


def test_closed_it_lets_nobody_in() -> None:
    async def close() -> None:
        inside = Admission(4, 1, 60)
        await inside.enter("a")
        late = asyncio.ensure_future(inside.enter("b"))
        await asyncio.sleep(0)
        inside.close()
        with pytest.raises(Draining):
            await inside.enter("c")
        inside.leave("a")
        await late
        inside.leave("b")
        assert inside.total == 0

    asyncio.run(close())


def test_one_more_than_there_is_room_for_is_refused_before_any_work() -> None:
    with running_gateway(FakeTransport(pause=0.2), max_requests=4) as gateway, ThreadPoolExecutor(12) as crowd:
        answers = list(crowd.map(lambda _: gateway.post("/v1/completions", **BODY), range(12)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 8
        assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert len(gateway.transport.calls) == 4
        # Looking is not work.
        assert gateway.http.get("/v1/models").status_code == 200


def test_a_reader_that_reads_nothing_is_cut_off_and_disturbs_nobody() -> None:
    with running_gateway(FakeTransport(), reader_seconds=0.5) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        body = json.dumps({**BODY, "prompt": "x" * 15_000, "echo": True, "n": 64, "stream": True, "max_tokens": 500})
        stalled = []
        for _ in range(4):
            made = socket.create_connection((host, int(port)))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            stalled.append(made)
        gateway.wait_until(lambda: len(gateway.transport.calls) == 4 * 64)
        assert gateway.post("/v1/completions", **BODY).status_code == 200
        gateway.wait_until(lambda: not gateway.transport.running)
        for made in stalled:
            made.close()
