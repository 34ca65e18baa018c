"""A call resumes after a fault: the caller gets the same text, tokens and usage as without the fault."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_transport import LM, FakeTransport
from hypothesis import given
from hypothesis import strategies as st
from tritonlm import AsyncClient
from tritonlm.client import load_balancer, resume
from tritonlm.client.load_balancer import LoadBalancer
from tritonlm.client.resume import Attempts
from tritonlm.client.stream import AsyncStream
from tritonlm.client.transport import Call, Prompt
from tritonlm.client.types import Completion
from tritonlm.contract import Broken, Draining, EngineFailure, QueueFull, TritonLMError, Unavailable

FAULTS = (Broken("died"), Unavailable("lost"))


async def stream_result(transports: list[FakeTransport], **arguments: Any) -> tuple[str, list[int], Any, int]:
    """The text, the tokens, the usage and the number of chunks of one stream."""
    async with AsyncClient(transports=transports, max_retries=0, repair_seconds=5) as client:
        stream = await client.completions.create(
            LM, "a b c", stream=True, seed=1, stream_options={"include_usage": True}, return_token_ids=True, **arguments
        )
        assert isinstance(stream, AsyncStream)
        chunks: list[Completion] = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.text for choice in choices)
    ids = [token for choice in choices for token in choice.token_ids or []]
    return text, ids, chunks[-1].usage, len(choices)


@given(
    faults=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(FAULTS)), min_size=1, max_size=4),
    arguments=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 30)},
        optional={"stop": st.sampled_from(["fox", " a", "👍"]), "echo": st.booleans(), "temperature": st.just(0)},
    ),
)
def test_a_stream_with_faults_has_the_same_result_as_without(
    faults: list[tuple[int, TritonLMError]], arguments: dict[str, Any]
) -> None:
    async def compare() -> None:
        expected = await stream_result([FakeTransport()], **arguments)
        transport = FakeTransport()
        transport.breaks_after, *transport.breaks_again = [
            # Before the first piece, only a dead process is waited for.
            (after, error if after else Broken("died"))
            for after, error in faults
        ]
        assert await stream_result([transport], **arguments) == expected
        for call in transport.calls[1:]:
            assert call.parameters.get("seed") == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritonlm.client.resume._FIRST_PAUSE_SECONDS", 0.0)
        asyncio.run(compare())


def test_each_attempt_has_its_own_id_and_the_remaining_time() -> None:
    async def ask() -> list[Call]:
        transport = FakeTransport(pause=0.001)
        transport.breaks_after = (1, Broken("died"))
        await stream_result([transport], max_tokens=20, timeout=9.0)
        return transport.calls

    first, second = asyncio.run(ask())
    assert second.request_id == f"{first.request_id}-1"
    assert second.timeout < first.timeout <= 9.0
    assert "resume_token_ids" not in first.parameters
    assert second.parameters["resume_token_ids"]


def test_a_call_fails_when_triton_does_not_recover_in_time() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.breaks_after, transport.breaks_again = (1, Broken("died")), [(0, Broken("died"))] * 50
        async with AsyncClient(transports=[transport], repair_seconds=0.3) as client:
            stream = await client.completions.create(LM, "a b c", stream=True, seed=1, max_tokens=20)
            with pytest.raises(Unavailable, match=r"did not recover in 0\.3 s: died"):
                async for _ in stream:
                    pass
        assert 2 <= len(transport.calls) <= 5

    asyncio.run(ask())


def test_the_time_for_a_repair_restarts_when_an_attempt_ran_before_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(resume, "time", clock)
    attempts = Attempts(Call(LM, "1", Prompt(), timeout=600), max_retries=0, repair_seconds=30)

    def attempt(start: float, end: float) -> None:
        clock.now = start
        attempts.next_call()
        clock.now = end
        attempts.pause_after(Broken("died"), responded_recently=True)

    attempt(0, 10)
    attempt(35, 45)
    attempt(74, 74.5)
    with pytest.raises(Unavailable, match="did not recover in 30 s"):
        attempt(76, 76.5)


@pytest.mark.parametrize("error", [EngineFailure("a step failed"), QueueFull("full")])
def test_other_errors_are_not_resumed(error: TritonLMError) -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.breaks_after = (1, error)
        with pytest.raises(type(error)):
            await stream_result([transport], max_tokens=20)
        assert len(transport.calls) == 1

    asyncio.run(ask())


def test_a_call_without_stream_is_computed_again_with_its_seed() -> None:
    async def ask(transport: FakeTransport) -> Completion:
        async with AsyncClient(transports=[transport], max_retries=0) as client:
            return await client.completions.create(LM, "a b c", max_tokens=20, n=3)

    broken = FakeTransport()
    broken.breaks_after = (0, Broken("died"))
    completion = asyncio.run(ask(broken))
    assert len(broken.calls) == 4
    assert len({choice.text for choice in completion.choices}) == 3


def test_an_embedding_is_computed_again_after_a_fault() -> None:
    async def ask(transport: FakeTransport) -> list[float]:
        async with AsyncClient(transports=[transport], max_retries=0) as client:
            embeddings = await client.embeddings.create(LM, "a b c", encoding_format="float")
            vector = embeddings.data[0].embedding
            assert isinstance(vector, list)
            return vector

    broken = FakeTransport()
    broken.trouble = [Broken("died"), Unavailable("away")]
    assert asyncio.run(ask(broken)) == asyncio.run(ask(FakeTransport()))
    assert len(broken.calls) == 3


def test_a_stream_resumes_on_the_other_triton() -> None:
    async def ask() -> None:
        expected = await stream_result([FakeTransport()], max_tokens=20)
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.breaks_after, first.trouble = (1, Broken("died")), []
        second.breaks_after = (1, Draining("stops"))
        assert await stream_result([first, second], max_tokens=20) == expected
        assert first.calls
        assert second.calls

    asyncio.run(ask())


def test_a_failed_triton_is_used_again_only_when_it_is_live() -> None:
    async def ask() -> None:
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.breaks_after, first.live = (0, Broken("hangs")), False
        async with AsyncClient(transports=[first, second], max_retries=0) as client:
            for _ in range(8):
                await client.completions.create(LM, "a b c", max_tokens=20)
                await asyncio.sleep(0.2)
            assert len(first.calls) <= 1
            first.live = True
            for _ in range(8):
                await client.completions.create(LM, "a b c", max_tokens=20)
                await asyncio.sleep(0.2)
        assert len(first.calls) > 2

    asyncio.run(ask())


def call_of(text: str) -> Call:
    return Call(LM, "id", Prompt(text=text))


def test_the_triton_with_the_fewest_calls_is_picked_and_a_failed_one_is_avoided() -> None:
    transports = [FakeTransport(f"fake:{number}") for number in range(3)]
    balancer = LoadBalancer(transports)
    for _ in range(9):
        balancer.call_started(balancer.pick(call_of("short")))
    assert set(balancer._running.values()) == {3}
    balancer.mark_failed(transports[0])
    assert {balancer.pick(call_of("short")).url for _ in range(6)} == {"fake:1", "fake:2"}
    for transport in transports:
        balancer.mark_failed(transport)
    assert balancer.pick().url == "fake:0", "if all are in backoff, the one whose backoff ends first"
    balancer.mark_healthy(transports[1])
    assert balancer.pick().url == "fake:1"


def test_a_triton_may_fail_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of floats overflows after a thousand failures."""
    now = 0.0
    monkeypatch.setattr(load_balancer, "time", SimpleNamespace(monotonic=lambda: now))
    transport = FakeTransport("fake:0")
    balancer = LoadBalancer([transport])
    for _ in range(1100):
        balancer.mark_failed(transport)
        now += 3600.0
    assert balancer.pick() is transport


def test_a_call_does_not_return_to_the_triton_that_just_failed_it() -> None:
    """Its backoff may end before the next attempt, and it has the fewest calls: it would be picked again."""
    transports = [FakeTransport(f"fake:{number}") for number in range(2)]
    balancer = LoadBalancer(transports)
    for _ in range(3):
        balancer.call_started(transports[1])
    assert balancer.pick().url == "fake:0"
    assert balancer.pick(failed=transports[0]).url == "fake:1"
    balancer.mark_failed(transports[1])
    assert balancer.pick(failed=transports[0]).url == "fake:0", "better the same one than one in backoff"


def test_long_prompts_with_a_shared_prefix_go_to_one_triton_up_to_a_limit() -> None:
    balancer = LoadBalancer([FakeTransport(f"fake:{number}") for number in range(3)])
    shared = "You are a helpful fox. " * 20
    picked = [balancer.pick(call_of(shared + str(number))) for number in range(9)]
    assert len({transport.url for transport in picked}) == 1
    for _ in range(5):
        balancer.call_started(picked[0])
    assert balancer.pick(call_of(shared)).url != picked[0].url
    fresh = LoadBalancer(balancer._transports)
    assert len({fresh.pick(call_of(f"{number}" + shared)).url for number in range(40)}) == 3
