"""How many are inside at once: the bound, the shares, the time to come back; and what a signal to stop does."""

from __future__ import annotations

import json
import math
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.fake_transport import LM, FakeTransport
from hypothesis import given
from hypothesis import strategies as st
from tritonlm.contract import Draining, QueueFull
from tritonlm.gateway import admission
from tritonlm.gateway.admission import Admission

from .conftest import running_gateway

BODY = {"model": LM, "prompt": "a", "max_tokens": 40}


@given(
    limit=st.integers(1, 20),
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=120),
)
def test_no_more_are_inside_than_allowed_and_who_has_nothing_inside_is_not_kept_out_by_one(
    limit: int, moves: list[tuple[bool, str]]
) -> None:
    inside = Admission(limit)
    for enters, caller in moves:
        if not enters:
            if inside.inside[caller]:
                inside.leave(caller)
            continue
        before, had = inside.total, inside.inside[caller]
        refused = False
        try:
            inside.enter(caller)
        except QueueFull:
            refused = True
        assert inside.total <= limit
        assert not refused or before >= limit or (before >= limit / 2 and had > 0)


def test_a_caller_that_takes_everything_leaves_room_for_one_that_comes_later() -> None:
    inside = Admission(10)
    for _ in range(10):
        inside.enter("greedy")
    with pytest.raises(QueueFull):
        inside.enter("modest")
    for _ in range(5):
        inside.leave("greedy")
        with pytest.raises(QueueFull, match="your share"):
            inside.enter("greedy")
        inside.enter("modest")
    assert (inside.inside["greedy"], inside.inside["modest"]) == (5, 5)


def test_the_time_to_come_back_is_that_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock)
    inside = Admission(4)
    for _ in range(4):
        inside.enter("a")
    assert inside.retry_after() == 1, "nothing is known yet"
    for _ in range(2):
        inside.leave("a")
        inside.enter("a")
    # Two in ten seconds: one in five.
    assert inside.retry_after() == math.ceil(10 / 2)
    clock += 60
    assert inside.retry_after() == 1


def test_closed_it_lets_nobody_in() -> None:
    inside = Admission(4)
    inside.enter("a")
    inside.close()
    with pytest.raises(Draining):
        inside.enter("b")
    inside.leave("a")
    assert inside.total == 0


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
