"""Long prompts against a running server: are all answered, and do the streams beside them keep their pace?

    scripts/bench long_prompts --url http://127.0.0.1:8080 [--model NAME] [--requests 8] [--prompt-tokens 1800]
        [--streams 4] [--long-tokens 8000]

First so many prompts at once: how many were answered, and the slowest one's time against the time that they take one
after the other. Then streams that decode, alone and while one long prompt is read: the gaps between their pieces.
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


class Caller:
    def __init__(self, url: str, model: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False)
        self._model, self._draw = model, random.Random(0)

    async def choose(self) -> str:
        """The model that is asked for, or the first one that is ready."""
        models = (await self._http.get("/v1/models")).json()["data"]
        self._model = self._model or next(model["id"] for model in models if model["state"] == "ready")
        return self._model

    def body(self, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        prompt = [self._draw.randrange(3, 250) for _ in range(prompt_tokens)]
        return {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    async def answer(self, body: dict[str, Any]) -> tuple[float, str]:
        """How long it took, and the error where it was not answered."""
        began = time.monotonic()
        response = await self._http.post("/v1/completions", json=body)
        error = "" if response.is_success else f"{response.status_code} {response.text[:200]}"
        return time.monotonic() - began, error

    async def gaps(self, body: dict[str, Any]) -> list[tuple[float, float]]:
        """When each piece of a stream came, and how long after the one before."""
        # Every token is a letter: text that ends inside a character would wait for the next token.
        tokens = await self._http.post("/tokenize", json={"model": self._model, "prompt": " a"})
        body = {**body, "logit_bias": {str(tokens.json()["tokens"][-1]): 100}}
        found, last = [], 0.0
        async with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:]), line
                    now = time.monotonic()
                    if last:
                        found.append((now, now - last))
                    last = now
        return found

    async def close(self) -> None:
        await self._http.aclose()


async def all_answered(caller: Caller, console: Console, requests: int, prompt_tokens: int) -> None:
    alone = [(await caller.answer(caller.body(prompt_tokens, 16)))[0] for _ in range(2)]
    found = await asyncio.gather(*(caller.answer(caller.body(prompt_tokens, 16)) for _ in range(requests)))
    errors = [error for _, error in found if error]
    slowest, one = max(seconds for seconds, _ in found), statistics.median(alone)
    console.print(
        f"{requests} × {prompt_tokens} tokens at once: {requests - len(errors)} of {requests} answered, "
        f"the slowest after {slowest:.1f} s; one alone {one:.1f} s, one after the other {requests * one:.1f} s "
        f"({slowest / (requests * one):.2f})"
    )
    for error in sorted(set(errors)):
        console.print(f"  {error}")


async def pace(caller: Caller, console: Console, streams: int, long_tokens: int) -> None:
    running = [asyncio.ensure_future(caller.gaps(caller.body(64, STREAM_TOKENS))) for _ in range(streams)]
    # Half of the streams' time without it.
    await asyncio.sleep(8)
    began = time.monotonic()
    _, error = await caller.answer(caller.body(long_tokens, 1))
    ended = time.monotonic()
    assert not error, error
    found = [gap for stream in await asyncio.gather(*running) for gap in stream]
    without = [gap for at, gap in found if at < began or at - gap > ended]
    beside = [gap for at, gap in found if began <= at <= ended]
    assert beside, "the streams ended before the long prompt came: ask for more tokens"
    median = statistics.median(without)
    high = statistics.quantiles(beside, n=100)[98]
    console.print(
        f"{streams} streams beside a prompt of {long_tokens} tokens (read in {ended - began:.1f} s): gaps without it "
        f"{1000 * median:.0f} ms (median), beside it {1000 * statistics.median(beside):.0f} ms (median), "
        f"{1000 * high:.0f} ms (99th percentile), {high / median:.2f} times the median without it"
    )


async def measure(options: argparse.Namespace) -> None:
    console, caller = Console(), Caller(options.url, options.model)
    try:
        console.print(f"model {await caller.choose()}")
        if options.requests:
            await all_answered(caller, console, options.requests, options.prompt_tokens)
        if options.streams:
            await pace(caller, console, options.streams, options.long_tokens)
    finally:
        await caller.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="")
    parser.add_argument("--requests", type=int, default=8, help="0: leave this part out")
    parser.add_argument("--prompt-tokens", type=int, default=1800)
    parser.add_argument("--streams", type=int, default=4, help="0: leave this part out")
    parser.add_argument("--long-tokens", type=int, default=8000)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
