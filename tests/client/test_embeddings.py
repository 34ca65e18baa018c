"""Embeddings of long lists: the limit of inputs, their order, how many are computed at once, and their time limit."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient
from tritonlm.client import sequences
from tritonlm.client.transport import Call, PromptEmbedding
from tritonlm.contract import InvalidRequest, TimedOut


class Counting(FakeTransport):
    """Knows how many embeddings are computed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = self.most = 0

    async def embed(self, call: Call) -> PromptEmbedding:
        self.computed += 1
        self.most = max(self.most, self.computed)
        await asyncio.sleep(0)
        self.computed -= 1
        return await super().embed(call)


def test_a_list_of_openais_length_is_embedded_in_order_and_leaves_slots_to_others() -> None:
    async def embed() -> None:
        transport = Counting()
        texts = ["a" * (1 + number % 7) for number in range(2048)]
        async with AsyncClient(transports=[transport]) as client:
            embeddings = await client.embeddings.create(LM, texts, encoding_format="float")
            assert [item.index for item in embeddings.data] == list(range(2048))
            assert [item.embedding[0] for item in embeddings.data] == [float(len(text)) for text in texts]
            assert embeddings.usage.prompt_tokens == 2048
            assert 1 < transport.most <= 32
            with pytest.raises(InvalidRequest, match="at most 2048 texts") as refused:
                await client.embeddings.create(LM, [*texts, "a"])
            assert refused.value.param == "input"

    asyncio.run(asyncio.wait_for(embed(), 60))


def test_the_time_limit_is_that_of_the_whole_list(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeTransport):
        """Each embedding takes a second of the clock."""

        seconds = 0.0

        async def embed(self, call: Call) -> PromptEmbedding:
            self.seconds += 1
            return await super().embed(call)

    async def embed() -> None:
        transport = Slow()
        monkeypatch.setattr(sequences, "time", SimpleNamespace(monotonic=lambda: transport.seconds))
        async with AsyncClient(transports=[transport]) as client:
            with pytest.raises(TimedOut):
                await client.embeddings.create(LM, ["a"] * 200, timeout=100)
        # Parts of 32, each with what the earlier ones have left.
        assert len(transport.calls) == 4 * 32
        limits = [call.timeout for call in transport.calls[::32]]
        assert limits == pytest.approx([100, 68, 36, 4], abs=1)

    asyncio.run(asyncio.wait_for(embed(), 60))
