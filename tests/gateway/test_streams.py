"""Streams over HTTP: they have the same content as the complete result, and concurrent requests do not mix."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fakes.fake_transport import LM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Gateway, running_gateway

# Some are parts of the fake's words, so that stops occur.
STOPS = [" fox", ".", "\n", " the a", "猫", "never said"]
# Any text except lone surrogates.
prompts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway() as running:
        yield running


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True, "stream_options": {"include_usage": True}}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(chunks: list[dict[str, Any]], index: int) -> tuple[str, list[str], list[float | None], list[str]]:
    """One choice's text, its log-probabilities' tokens and values, and its finish reasons."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    scored = [part["logprobs"] for part in parts if part["logprobs"]]
    return (
        "".join(part["text"] for part in parts),
        [token for entry in scored for token in entry["tokens"]],
        [value for entry in scored for value in entry["token_logprobs"]],
        [part["finish_reason"] for part in parts if part["finish_reason"]],
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(prompts, min_size=1, max_size=3),
    n=st.integers(1, 3),
    stop=st.none() | st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
    logprobs=st.none() | st.integers(0, 3),
    echo=st.booleans(),
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0, 0.7, 2]),
    seed=st.integers(0, 2**32),
)
def test_a_stream_has_the_content_of_the_complete_result(gateway: Gateway, **body: Any) -> None:
    complete = gateway.post("/v1/completions", model=LM, **body)
    assert complete.status_code == 200, complete.text
    *chunks, last = streamed(gateway.http, "/v1/completions", {"model": LM, **body})
    assert last["usage"] == complete.json()["usage"]
    for choice in complete.json()["choices"]:
        scored = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
        text, tokens, values, reasons = joined(chunks, choice["index"])
        assert text == choice["text"]
        assert (tokens, values) == (scored["tokens"], scored["token_logprobs"])
        assert reasons == [choice["finish_reason"]]


def test_sixty_four_concurrent_requests_do_not_mix_their_texts(gateway: Gateway) -> None:
    rng = random.Random(5)
    bodies = [
        {
            "model": LM, "prompt": f"{number} {rng.random()}", "n": rng.choice([1, 1, 3]), "seed": number,
            "max_tokens": rng.randrange(1, 40), "stop": rng.choice([None, ".", "\n"]),
        }
        for number in range(64)
    ]  # fmt: skip
    alone = [gateway.post("/v1/completions", **body).json()["choices"] for body in bodies]
    gateway.transport.pause = 0.01

    def ask(number: int) -> list[str]:
        with httpx.Client(base_url=gateway.url, timeout=30) as http:
            if number % 3:
                chunks = streamed(http, "/v1/completions", bodies[number])
                return [joined(chunks, index)[0] for index in range(int(bodies[number]["n"]))]
            answer = http.post("/v1/completions", json=bodies[number]).json()
            return [choice["text"] for choice in answer["choices"]]

    try:
        with ThreadPoolExecutor(64) as pool:
            texts = list(pool.map(ask, range(64)))
    finally:
        gateway.transport.pause = 0.0
    assert texts == [[choice["text"] for choice in choices] for choices in alone]
