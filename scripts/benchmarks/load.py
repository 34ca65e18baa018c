"""A closed-loop load client for OpenAI-style completions: concurrent greedy streams of exact length.

It knows HTTP only and measures every server alike: the tokens that `usage` reports, over the time from the first
request to the last byte. A workload of one output token measures the prompt: its tokens count instead.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from tokenizers import Tokenizer

SECONDS = 900.0


@dataclass(frozen=True)
class Workload:
    name: str
    concurrency: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    shared_tokens: int = 0

    @property
    def counted_tokens(self) -> int:
        """The tokens of a request that count for the speed."""
        return self.max_tokens if self.max_tokens > 1 else self.prompt_tokens + self.shared_tokens


@dataclass
class Measurement:
    tokens: int = 0
    seconds: float = 0.0
    first_text: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_milliseconds(self) -> float:
        return 1000 * statistics.median(self.first_text)


def prompts_of(work: Workload, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Texts of one-token words, so that every server gets the same number of tokens."""
    words = _one_token_words(tokenizer)
    rng = random.Random(f"{work.name} {seed}")

    def text(count: int) -> str:
        return "".join(rng.choice(words) for _ in range(count))

    shared = text(work.shared_tokens)
    return [shared + text(work.prompt_tokens) for _ in range(work.requests)]


@functools.cache
def _one_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words of letters after a space, which byte-level tokenizers write as Ġ and the others as ▁."""
    words = sorted(f" {word[1:]}" for word in tokenizer.get_vocab() if word[:1] in ("Ġ", "▁") and word[1:].isalpha())
    words = [word for word in words if word.isascii()]
    encodings = tokenizer.encode_batch(words, add_special_tokens=False)
    return [word for word, encoding in zip(words, encodings, strict=True) if len(encoding.ids) == 1]


def measure(
    url: str, model: str, work: Workload, prompts: Sequence[str], options: Mapping[str, object] | None = None
) -> Measurement:
    """`options` are further fields of each request."""
    body = {
        "model": model, "max_tokens": work.max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **(options or {}),
    }  # fmt: skip
    return asyncio.run(_measure(f"{url}/v1/completions", body, work, iter(prompts)))


async def _measure(url: str, body: dict[str, object], work: Workload, prompts: Iterator[str]) -> Measurement:
    result = Measurement()
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    # One connection per request: one of the servers closes connections after a response without notice.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=2**18) as session:

        async def worker() -> None:
            for prompt in prompts:
                await _send(session, url, {**body, "prompt": prompt}, result)
                result.tokens += work.counted_tokens

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(work.concurrency)))
        result.seconds = time.perf_counter() - start
    return result


async def _send(session: aiohttp.ClientSession, url: str, body: dict[str, object], result: Measurement) -> None:
    start, last, tokens = time.perf_counter(), None, 0
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answers {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event, now = json.loads(line[5:]), time.perf_counter()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if any(choice.get("text") for choice in event.get("choices") or []):
                result.first_text.append(now - start) if last is None else result.gaps.append(now - last)
                last = now
    if tokens != body["max_tokens"]:
        raise RuntimeError(f"{url} generated {tokens} tokens instead of {body['max_tokens']}")
