"""`tritonlm bench`: a short load on a running server; reports tokens per second and token latencies.

It measures on the client's side. Compare runs on an idle machine only; this is not a test.
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

from .common import AsJson, Triton, adapters_folder, addresses, console, err_console, exit_code, first_ready, print_json
from .text import ModelOption


@dataclass(frozen=True)
class RequestTiming:
    """The timing of one request, measured by the client."""

    tokens: int
    first_token_seconds: float
    total_seconds: float


def bench(
    model: ModelOption = None,
    requests: Annotated[int, typer.Option(min=1, help="number of requests")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="concurrent requests")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="length of each prompt")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens generated for each request")] = 64,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Put a short load on a running server; report throughput and latency as clients see them."""
    try:
        with err_console.status(f"{requests} requests, {concurrency} at a time …"):
            report = asyncio.run(_measure(addresses(triton), model, requests, concurrency, prompt_tokens, max_tokens))
    except TritonLMError as error:
        terminal.print_error(error)
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
    semaphore = asyncio.Semaphore(concurrency)
    async with AsyncClient(urls, adapters_folder=adapters_folder()) as client:
        name = model or first_ready(await client.models.list())
        vocabulary = (await client.about(name))["vocab_size"]

        async def send(number: int) -> RequestTiming:
            # Prompts differ from the first id on, so that no prompt hits the prefix cache.
            prompt = [(number * 7919 + position * 31) % vocabulary for position in range(prompt_tokens)]
            async with semaphore:
                started = time.perf_counter()
                stream = await client.generate(name, prompt, max_tokens=max_tokens, ignore_eos=True, seed=number)
                first, tokens = 0.0, 0
                async with stream:
                    async for piece in stream:
                        first = first or time.perf_counter() - started
                        tokens = piece.completion_tokens
                return RequestTiming(tokens, first, time.perf_counter() - started)

        await send(-1)
        started = time.perf_counter()
        timings = await asyncio.gather(*map(send, range(requests)))
    return {"model": name, **_summary(timings, time.perf_counter() - started)}


def _summary(timings: list[RequestTiming], seconds: float) -> dict[str, float]:
    firsts = sorted(timing.first_token_seconds * 1000 for timing in timings)
    between = [
        (timing.total_seconds - timing.first_token_seconds) * 1000 / max(timing.tokens - 1, 1) for timing in timings
    ]
    return {
        "requests": len(timings),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(timing.tokens for timing in timings) / seconds, 1),
        "first_token_ms_median": round(statistics.median(firsts), 1),
        "first_token_ms_p95": round(firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))], 1),
        "between_tokens_ms_median": round(statistics.median(between), 2),
    }
