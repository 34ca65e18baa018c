"""Long prompts on a running server: whether all are answered, and how they slow down concurrent streams.

    scripts/bench long_prompts --url http://127.0.0.1:8080 [--model NAME] [--requests 8] [--prompt-tokens 1800]
        [--streams 4] [--long-tokens 8000]

Part one sends long prompts concurrently: the number answered, and the slowest response time compared with sequential
processing. Part two measures the gaps between chunks of decoding streams, alone and during a long prompt's prefill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import httpx
from rich.console import Console

TIMEOUT_SECONDS = 1800.0
STREAM_TOKENS = 400


class Client:
    def __init__(self, url: str, model: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False)
        self._model, self._rng = model, random.Random(0)

    async def choose_model(self) -> str:
        """Choose the requested model, or the first one that is ready; return its name."""
        models = (await self._http.get("/v1/models")).json()["data"]
        self._model = self._model or next(model["id"] for model in models if model["state"] == "ready")
        return self._model

    def body(self, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        prompt = [self._rng.randrange(3, 250) for _ in range(prompt_tokens)]
        return {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    async def complete(self, body: dict[str, Any]) -> tuple[float, str]:
        """The seconds that the request took, and its error if there was one."""
        start = time.monotonic()
        response = await self._http.post("/v1/completions", json=body)
        error = "" if response.is_success else f"{response.status_code} {response.text[:200]}"
        return time.monotonic() - start, error

    async def gaps(self, body: dict[str, Any]) -> list[tuple[float, float]]:
        """For each chunk of a stream, the time it arrived and the gap since the one before."""
        # Force every token to be a letter: an incomplete character would delay the text to the next token.
        tokens = await self._http.post("/tokenize", json={"model": self._model, "prompt": " a"})
        body = {**body, "logit_bias": {str(tokens.json()["tokens"][-1]): 100}}
        gaps, last = [], 0.0
        async with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:]), line
                    now = time.monotonic()
                    if last:
                        gaps.append((now, now - last))
                    last = now
        return gaps

    async def close(self) -> None:
        await self._http.aclose()


async def measure_concurrent_prompts(client: Client, console: Console, requests: int, prompt_tokens: int) -> None:
    alone = [(await client.complete(client.body(prompt_tokens, 16)))[0] for _ in range(2)]
    results = await asyncio.gather(*(client.complete(client.body(prompt_tokens, 16)) for _ in range(requests)))
    errors = [error for _, error in results if error]
    slowest, one = max(seconds for seconds, _ in results), statistics.median(alone)
    console.print(
        f"{requests} × {prompt_tokens} tokens concurrently: {requests - len(errors)} of {requests} answered, "
        f"the slowest after {slowest:.1f} s; one alone {one:.1f} s, sequentially {requests * one:.1f} s "
        f"({slowest / (requests * one):.2f})"
    )
    for error in sorted(set(errors)):
        console.print(f"  {error}")


async def measure_stream_gaps(client: Client, console: Console, streams: int, long_tokens: int) -> None:
    running = [asyncio.ensure_future(client.gaps(client.body(64, STREAM_TOKENS))) for _ in range(streams)]
    # Measure about half of the streams' time without the long prompt.
    await asyncio.sleep(8)
    start = time.monotonic()
    _, error = await client.complete(client.body(long_tokens, 1))
    end = time.monotonic()
    assert not error, error
    gaps = [gap for stream in await asyncio.gather(*running) for gap in stream]
    alone = [gap for timestamp, gap in gaps if timestamp < start or timestamp - gap > end]
    during = [gap for timestamp, gap in gaps if start <= timestamp <= end]
    assert during, "the streams ended before the long prompt: increase STREAM_TOKENS"
    median = statistics.median(alone)
    high = statistics.quantiles(during, n=100)[98]
    console.print(
        f"{streams} streams during a prefill of {long_tokens} tokens ({end - start:.1f} s): gaps alone "
        f"{1000 * median:.0f} ms (median), during the prefill {1000 * statistics.median(during):.0f} ms (median), "
        f"{1000 * high:.0f} ms (99th percentile), {high / median:.2f} times the median alone"
    )


async def measure(options: argparse.Namespace) -> None:
    console, client = Console(), Client(options.url, options.model)
    try:
        console.print(f"model {await client.choose_model()}")
        if options.requests:
            await measure_concurrent_prompts(client, console, options.requests, options.prompt_tokens)
        if options.streams:
            await measure_stream_gaps(client, console, options.streams, options.long_tokens)
    finally:
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="")
    parser.add_argument("--requests", type=int, default=8, help="0: skip this part")
    parser.add_argument("--prompt-tokens", type=int, default=1800)
    parser.add_argument("--streams", type=int, default=4, help="0: skip this part")
    parser.add_argument("--long-tokens", type=int, default=8000)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
