"""After a fault a call goes on where it was: the caller sees exactly the text, the tokens and the usage of no fault."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes.fake_transport import LM, FakeTransport
from hypothesis import given
from hypothesis import strategies as st
from tritonlm import AsyncClient
from tritonlm.client.choice import Choice
from tritonlm.client.stream import AsyncStream
from tritonlm.client.transport import Call, Prompt
from tritonlm.client.types import Completion
from tritonlm.contract import Broken, Draining, EngineFailure, QueueFull, TritonLMError, Unavailable

FAULTS = (Broken("died"), Unavailable("lost"))


async def told(transports: list[FakeTransport], **arguments: Any) -> tuple[str, list[int], Any, int]:
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
def test_a_stream_that_breaks_anywhere_is_as_if_it_had_not(
    faults: list[tuple[int, TritonLMError]], arguments: dict[str, Any]
) -> None:
    async def compare() -> None:
        expected = await told([FakeTransport()], **arguments)
        transport = FakeTransport()
        transport.breaks_after, *transport.breaks_again = [
            # Before anything has come only a process that has died is waited for.
            (after, error if after else Broken("died"))
            for after, error in faults
        ]
        assert await told([transport], **arguments) == expected
        for call in transport.calls[1:]:
            assert call.parameters.get("seed") == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritonlm.client.resume._FIRST_PAUSE_SECONDS", 0.0)
        asyncio.run(compare())


def test_each_try_has_an_id_and_less_time() -> None:
    async def ask() -> list[Call]:
        transport = FakeTransport(pause=0.001)
        transport.breaks_after = (1, Broken("died"))
        await told([transport], max_tokens=20, timeout=9.0)
        return transport.calls

    first, second = asyncio.run(ask())
    assert second.request_id == f"{first.request_id}-1"
    assert second.timeout < first.timeout <= 9.0
    assert "resume_token_ids" not in first.parameters
    assert second.parameters["resume_token_ids"]


def test_what_is_not_brought_back_in_time_fails_honestly() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.breaks_after, transport.breaks_again = (1, Broken("died")), [(0, Broken("died"))] * 50
        async with AsyncClient(transports=[transport], repair_seconds=0.3) as client:
            stream = await client.completions.create(LM, "a b c", stream=True, seed=1, max_tokens=20)
            with pytest.raises(Unavailable, match=r"not brought back in 0\.3 s: died"):
                async for _ in stream:
                    pass
        assert 2 <= len(transport.calls) <= 5

    asyncio.run(ask())


@pytest.mark.parametrize("error", [EngineFailure("a step failed"), QueueFull("full")])
def test_other_errors_are_not_gone_on_from(error: TritonLMError) -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.breaks_after = (1, error)
        with pytest.raises(type(error)):
            await told([transport], max_tokens=20)
        assert len(transport.calls) == 1

    asyncio.run(ask())


def test_a_call_that_is_not_streamed_is_computed_again_from_its_seed() -> None:
    async def ask(transport: FakeTransport) -> Completion:
        async with AsyncClient(transports=[transport], max_retries=0) as client:
            return await client.completions.create(LM, "a b c", max_tokens=20, n=3)

    broken = FakeTransport()
    broken.breaks_after = (0, Broken("died"))
    found = asyncio.run(ask(broken))
    assert len(broken.calls) == 4
    assert len({choice.text for choice in found.choices}) == 3


def test_an_embedding_is_computed_again() -> None:
    async def ask(transport: FakeTransport) -> list[float]:
        async with AsyncClient(transports=[transport], max_retries=0) as client:
            found = await client.embeddings.create(LM, "a b c", encoding_format="float")
            vector = found.data[0].embedding
            assert isinstance(vector, list)
            return vector

    broken = FakeTransport()
    broken.trouble = [Broken("died"), Unavailable("away")]
    assert asyncio.run(ask(broken)) == asyncio.run(ask(FakeTransport()))
    assert len(broken.calls) == 3


def test_a_stream_goes_on_at_the_other_triton() -> None:
    async def ask() -> None:
        expected = await told([FakeTransport()], max_tokens=20)
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.breaks_after, first.trouble = (1, Broken("died")), []
        second.breaks_after = (1, Draining("stops"))
        assert await told([first, second], max_tokens=20) == expected
        assert first.calls
        assert second.calls

    asyncio.run(ask())


def test_one_that_has_failed_is_asked_for_a_sign_of_life_first() -> None:
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


def test_the_triton_with_the_fewest_calls_is_asked_and_one_that_fails_rests() -> None:
    transports = [FakeTransport(f"fake:{number}") for number in range(3)]
    choice = Choice(transports)
    for _ in range(9):
        choice.begin(choice.next(call_of("short")))
    assert set(choice._running.values()) == {3}
    choice.failed(transports[0])
    assert {choice.next(call_of("short")).url for _ in range(6)} == {"fake:1", "fake:2"}
    for transport in transports:
        choice.failed(transport)
    assert choice.next().url == "fake:0", "of those that rest, the one whose rest ends first"
    choice.answered(transports[1])
    assert choice.next().url == "fake:1"


def test_who_has_just_been_refused_by_one_is_sent_to_another() -> None:
    """Its rest may end in the pause before the next try; it has the fewest calls, and would be asked again."""
    transports = [FakeTransport(f"fake:{number}") for number in range(2)]
    choice = Choice(transports)
    for _ in range(3):
        choice.begin(transports[1])
    assert choice.next().url == "fake:0"
    assert choice.next(after=transports[0]).url == "fake:1"
    choice.failed(transports[1])
    assert choice.next(after=transports[0]).url == "fake:0", "better the same than one that rests"


def test_long_prompts_with_one_beginning_go_to_one_triton_while_it_has_few_more_calls() -> None:
    choice = Choice([FakeTransport(f"fake:{number}") for number in range(3)])
    shared = "You are a helpful fox. " * 20
    chosen = [choice.next(call_of(shared + str(number))) for number in range(9)]
    assert len({transport.url for transport in chosen}) == 1
    for _ in range(5):
        choice.begin(chosen[0])
    assert choice.next(call_of(shared)).url != chosen[0].url
    fresh = Choice(choice._transports)
    assert len({fresh.next(call_of(f"{number}" + shared)).url for number in range(40)}) == 3
