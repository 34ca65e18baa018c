"""What the gateway costs: requests/s, time to the first byte and chunks/s through it, beside direct gRPC.

    scripts/bench gateway [--requests 200] [--streams 8] [--chunks 500]

The ensemble is the real one on a real Triton; in place of the engine stands one that answers at once with one-token
chunks, so that nothing but the way is measured. Both ways take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tritonlm import AsyncClient
from tritonlm.client.stream import AsyncStream
from tritonlm.serving import Settings, paths
from tritonlm.serving.catalogue import catalogue
from tritonlm.serving.control import TritonControl, bounded
from tritonlm.serving.gateway import LocalGateway
from tritonlm.serving.placeholder import Reception
from tritonlm.serving.supervisor import prepare, start

LM = "abacus"
LOAD_SECONDS = 120.0
CONCURRENT = 16


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def make_repository(folder: Path) -> Path:
    """The model repository with the instant stand-in for `generate`."""
    repository = folder / "model_repository"
    shutil.copytree(paths.model_repository(), repository, ignore=shutil.ignore_patterns("__pycache__", "engine"))
    shutil.copy(Path(__file__).with_name("instant_generate.py"), repository / "generate" / "1" / "model.py")
    # Nothing is computed, so that the context can be as long as the streams.
    config = repository / LM / "1" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "n_positions": 4096}))
    return repository


class Ways:
    """The same request by both ways: how long until the first chunk, and how many came."""

    def __init__(self, http: httpx.AsyncClient, client: AsyncClient) -> None:
        self._http, self._client = http, client

    async def gateway(self, tokens: int) -> tuple[float, int]:
        body = {"model": LM, "prompt": "Once", "max_tokens": tokens, "stream": True}
        begun, first, count = time.perf_counter(), 0.0, 0
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - begun
                    count += 1
        return first, count

    async def direct(self, tokens: int) -> tuple[float, int]:
        begun, first, count = time.perf_counter(), 0.0, 0
        stream = await self._client.completions.create(LM, "Once", max_tokens=tokens, stream=True)
        assert isinstance(stream, AsyncStream)
        async for _ in stream:
            first = first or time.perf_counter() - begun
            count += 1
        return first, count


Way = Callable[[int], Awaitable[tuple[float, int]]]


async def measure(ways: Ways, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    both: dict[str, Way] = {"gateway": ways.gateway, "direct": ways.direct}
    for way in both.values():
        await asyncio.gather(*(way(20) for _ in range(CONCURRENT)))
    firsts: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(arguments.requests):
        for name, way in both.items():
            firsts[name].append((await way(1))[0])
    found: dict[str, dict[str, float]] = {}
    for name, way in both.items():
        requests = await _rate(way, 1, CONCURRENT, arguments.requests * 2)
        chunks = await _rate(way, arguments.chunks, arguments.streams, arguments.streams)
        found[name] = {"first_ms": statistics.median(firsts[name]) * 1000, "requests": requests, "chunks": chunks}
    return found


async def _rate(way: Way, tokens: int, at_once: int, calls: int) -> float:
    """Chunks per second of so many calls, so many at once."""
    left = iter(range(calls))

    async def work() -> int:
        return sum([(await way(tokens))[1] for _ in left])

    begun = time.perf_counter()
    counts = await asyncio.gather(*(work() for _ in range(at_once)))
    return sum(counts) / (time.perf_counter() - begun)


async def run(settings: Settings, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    base, triton = f"http://127.0.0.1:{settings.port}", f"127.0.0.1:{settings.grpc_port}"
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=60, limits=limits) as http,
        AsyncClient(triton) as client,
    ):
        return await measure(Ways(http, client), arguments)


def show(found: dict[str, Any]) -> None:
    table = Table(title="The way alone: one-token chunks from an engine that answers at once")
    for column in ("", "first chunk, ms", "one-token requests/s", "chunks/s"):
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(name, f"{row['first_ms']:.2f}", f"{row['requests']:,.0f}", f"{row['chunks']:,.0f}")
    Console().print(table)
    Console().print(
        f"The gateway adds {found['gateway']['first_ms'] - found['direct']['first_ms']:.2f} ms to the first chunk."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench gateway", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="requests one after the other, for the first chunk")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=500, help="chunks of each stream")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ports = dict(zip(("port", "http_port", "grpc_port", "metrics_port"), free_ports(4), strict=True))
        settings = Settings(model_repository=[make_repository(Path(folder))], device="cpu", **ports)
        found_models = catalogue(settings)
        triton = prepare(settings, found_models)
        reception = stack.enter_context(Reception(settings.host, settings.port))
        gateway = LocalGateway(settings, found_models.default, reception)
        control = stack.enter_context(TritonControl(settings.triton_host, settings.http_port))
        for child in (triton, gateway):
            stack.callback(child.stop)
        gateway.start()
        start(triton, control)
        control.load(LM, bounded(LOAD_SECONDS))
        gateway.wait_until_live()
        found = asyncio.run(run(settings, arguments))
    print(json.dumps(found)) if arguments.json else show(found)


if __name__ == "__main__":
    main()
