"""The overhead of the gateway: requests/s, time to the first byte and chunks/s, compared with direct gRPC.

    scripts/bench gateway [--requests 200] [--streams 8] [--chunks 500]

The ensemble and Triton are real. The engine is replaced by a stub that sends one-token chunks at once, so that only
the path is measured. The benchmark alternates between both paths.
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
from tritonlm.serving.control import TritonControl, deadline_check
from tritonlm.serving.gateway import LocalGateway
from tritonlm.serving.model_selection import select_models, write_models
from tritonlm.serving.placeholder import PlaceholderListener
from tritonlm.serving.supervisor import prepare, start

LM = "abacus"
LOAD_SECONDS = 120.0
CONCURRENT = 16


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def make_repository(folder: Path) -> Path:
    """The model repository, with the stub in place of `generate`."""
    repository = folder / "model_repository"
    shutil.copytree(paths.model_repository(), repository, ignore=shutil.ignore_patterns("__pycache__", "engine"))
    shutil.copy(Path(__file__).with_name("instant_generate.py"), repository / "generate" / "1" / "model.py")
    # The stub computes nothing, so the context can be as long as the streams.
    config = repository / LM / "1" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "n_positions": 4096}))
    return repository


class Paths:
    """Sends a request by either path; returns the seconds until the first chunk and the number of chunks."""

    def __init__(self, http: httpx.AsyncClient, client: AsyncClient) -> None:
        self._http, self._client = http, client

    async def gateway(self, tokens: int) -> tuple[float, int]:
        body = {"model": LM, "prompt": "Once", "max_tokens": tokens, "stream": True}
        start, first, count = time.perf_counter(), 0.0, 0
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - start
                    count += 1
        return first, count

    async def direct(self, tokens: int) -> tuple[float, int]:
        start, first, count = time.perf_counter(), 0.0, 0
        stream = await self._client.completions.create(LM, "Once", max_tokens=tokens, stream=True)
        assert isinstance(stream, AsyncStream)
        async for _ in stream:
            first = first or time.perf_counter() - start
            count += 1
        return first, count


Sender = Callable[[int], Awaitable[tuple[float, int]]]


async def measure(paths: Paths, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    senders: dict[str, Sender] = {"gateway": paths.gateway, "direct": paths.direct}
    for send in senders.values():
        await asyncio.gather(*(send(20) for _ in range(CONCURRENT)))
    firsts: dict[str, list[float]] = {name: [] for name in senders}
    for _ in range(arguments.requests):
        for name, send in senders.items():
            firsts[name].append((await send(1))[0])
    results: dict[str, dict[str, float]] = {}
    for name, send in senders.items():
        requests = await _rate(send, 1, CONCURRENT, arguments.requests * 2)
        chunks = await _rate(send, arguments.chunks, arguments.streams, arguments.streams)
        results[name] = {"first_ms": statistics.median(firsts[name]) * 1000, "requests": requests, "chunks": chunks}
    return results


async def _rate(send: Sender, tokens: int, concurrency: int, calls: int) -> float:
    """Chunks per second over `calls` calls, `concurrency` at a time."""
    remaining = iter(range(calls))

    async def work() -> int:
        return sum([(await send(tokens))[1] for _ in remaining])

    start = time.perf_counter()
    counts = await asyncio.gather(*(work() for _ in range(concurrency)))
    return sum(counts) / (time.perf_counter() - start)


async def run(settings: Settings, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    base, triton = f"http://127.0.0.1:{settings.port}", f"127.0.0.1:{settings.grpc_port}"
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=60, limits=limits) as http,
        AsyncClient(triton) as client,
    ):
        return await measure(Paths(http, client), arguments)


def show(results: dict[str, Any]) -> None:
    table = Table(title="The path alone: one-token chunks from a stub engine")
    for column in ("", "first chunk, ms", "one-token requests/s", "chunks/s"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, f"{row['first_ms']:.2f}", f"{row['requests']:,.0f}", f"{row['chunks']:,.0f}")
    Console().print(table)
    Console().print(
        f"The gateway adds {results['gateway']['first_ms'] - results['direct']['first_ms']:.2f} ms to the first chunk."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench gateway", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="sequential requests, for the first chunk")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=500, help="chunks of each stream")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ports = dict(zip(("port", "http_port", "grpc_port", "metrics_port"), free_ports(4), strict=True))
        settings = Settings(model_repository=[make_repository(Path(folder))], device="cpu", **ports)
        selection = select_models(settings)
        triton = prepare(settings, write_models(settings, selection))
        placeholder = stack.enter_context(PlaceholderListener(settings.host, settings.port))
        gateway = LocalGateway(settings, selection.default, placeholder)
        control = stack.enter_context(TritonControl(settings.triton_host, settings.http_port))
        for child in (triton, gateway):
            stack.callback(child.stop)
        gateway.start()
        start(triton, control, lambda: control.load(LM, deadline_check(LOAD_SECONDS)))
        gateway.wait_until_live()
        results = asyncio.run(run(settings, arguments))
    print(json.dumps(results)) if arguments.json else show(results)


if __name__ == "__main__":
    main()
