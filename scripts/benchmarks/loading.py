"""The speed of one language model while another one loads, on a running server.

    scripts/bench loading MODEL OTHER --url http://127.0.0.1:8080 [--streams 4]

OTHER is unloaded and loaded while streams of MODEL run. The result compares tokens/s during the load and before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import httpx
from rich.console import Console

TIMEOUT_SECONDS = 1800.0
# The time that is measured before the load.
ALONE_SECONDS = 10.0
STREAM_TOKENS = 200


class Load:
    """Streams of one model that start again when they end, and the arrival times of their tokens."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http, self._model = http, model
        self._arrivals: list[tuple[float, int]] = []

    async def stream_forever(self, number: int) -> None:
        body = {
            "model": self._model, "prompt": f"Once {number}", "max_tokens": STREAM_TOKENS, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        while True:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        count = sum(len(choice["token_ids"] or ()) for choice in choices)
                        self._arrivals.append((time.monotonic(), count))

    def rate(self, start: float, end: float) -> float:
        return sum(count for arrived, count in self._arrivals if start <= arrived < end) / (end - start)


async def measure(options: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False) as http:
        await http.post(f"/api/models/{options.other}/unload")
        load = Load(http, options.model)
        streams = [asyncio.ensure_future(load.stream_forever(number)) for number in range(options.streams)]
        try:
            # The first tokens of the streams are not measured.
            await asyncio.sleep(ALONE_SECONDS / 2)
            began = time.monotonic()
            await asyncio.sleep(ALONE_SECONDS)
            loading = time.monotonic()
            (await http.post(f"/api/models/{options.other}/load")).raise_for_status()
            loaded = time.monotonic()
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    alone, during = load.rate(began, loading), load.rate(loading, loaded)
    Console().print(
        f"{options.streams} streams of {options.model}: {alone:.1f} tokens/s alone, {during:.1f} while {options.other} "
        f"loads ({loaded - loading:.1f} s), ratio {during / alone:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("other")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--streams", type=int, default=4)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
