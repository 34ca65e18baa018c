"""`tritonlm bench`: a short load on a running server: tokens per second, time to the first token, between tokens.

It measures what a caller sees. Compare runs on a quiet machine; nothing here is a test.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from tritonlm.client.async_client import AsyncClient
from tritonlm.contract import TritonLMError
from tritonlm.serving import terminal

from .common import AsJson, Triton, addresses, console, exit_code, first_ready, notes, print_json
from .text import ModelOption


@dataclass(frozen=True)
class Seen:
    """One answer, as its caller saw it."""

    tokens: int
    first: float
    seconds: float


def bench(
    model: ModelOption = None,
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="how many at once")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="length of each prompt")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="length of each answer")] = 64,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Put a short load on a running server and tell what its callers see."""
    try:
        with notes.status(f"{requests} requests, {concurrency} at once …"):
            report = asyncio.run(_measure(addresses(triton), model, requests, concurrency, prompt_tokens, max_tokens))
    except TritonLMError as error:
        terminal.explain(error)
        raise typer.Exit(exit_code(error)) from None
    if as_json:
        print_json(report)
        return
    table = Table("measure", str(report["model"]))
    for name, value in report.items():
        if name != "model":
            table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


async def _measure(
    urls: list[str], model: str | None, requests: int, concurrency: int, prompt_tokens: int, max_tokens: int
) -> dict[str, Any]:
    room = asyncio.Semaphore(concurrency)
    async with AsyncClient(urls) as client:
        name = model or first_ready(await client.models.list())
        vocabulary = (await client.about(name))["vocab_size"]

        async def ask(number: int) -> Seen:
            # Ids that differ from the first on: the prefix cache must not answer for the engine.
            prompt = [(number * 7919 + place * 31) % vocabulary for place in range(prompt_tokens)]
            async with room:
                begun = time.perf_counter()
                stream = await client.generate(name, prompt, max_tokens=max_tokens, ignore_eos=True, seed=number)
                first, tokens = 0.0, 0
                async with stream:
                    async for piece in stream:
                        first = first or time.perf_counter() - begun
                        tokens = piece.completion_tokens
                return Seen(tokens, first, time.perf_counter() - begun)

        await ask(-1)
        begun = time.perf_counter()
        seen = await asyncio.gather(*map(ask, range(requests)))
    return {"model": name, **_summary(seen, time.perf_counter() - begun)}


def _summary(seen: list[Seen], seconds: float) -> dict[str, float]:
    firsts = sorted(answer.first * 1000 for answer in seen)
    between = [(answer.seconds - answer.first) * 1000 / max(answer.tokens - 1, 1) for answer in seen]
    return {
        "requests": len(seen),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(answer.tokens for answer in seen) / seconds, 1),
        "first_token_ms_median": round(statistics.median(firsts), 1),
        "first_token_ms_p95": round(firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))], 1),
        "between_tokens_ms_median": round(statistics.median(between), 2),
    }
