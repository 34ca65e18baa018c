"""Many short requests, some cancelled and some malformed: no resources leak.

    scripts/load wear [--requests 20000] [--clients 32]

A tenth of the requests is cancelled, a twentieth is malformed. Checks: memory of all processes (growth under 5 %), open
files, threads, running and waiting requests, and files in /dev/shm are the same after the requests as before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from checks import Check, console, report_checks
from rich.progress import Progress
from servers import Fleet, fleet

WARM_UP, SETTLE_SECONDS = 2000, 6.0
CANCELLED, MALFORMED = 0.10, 0.05
BAD: list[bytes] = [
    b"{", b"[]", b'{"model": "abacus"}', b'{"model": "abacus", "prompt": "1+1=", "max_tokens": -1}', b"\xff\xfe",
    b'{"model": "abacus", "prompt": []}', b'{"model": "nobody", "prompt": "x"}',
    b'{"model": "abacus", "prompt": "x", "n": 1e9}',
]  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """The resources that the servers hold."""

    memory: int
    files: int
    threads: int
    shared: int
    requests: int

    @classmethod
    async def measure(cls, servers: Fleet, session: aiohttp.ClientSession) -> Resources:
        files = threads = 0
        for process in servers.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                files, threads = files + process.num_fds(), threads + process.num_threads()
        shared = sum(1 for _ in Path("/dev/shm").glob("tritonlm-*"))
        async with session.get(f"{servers.url}/health") as response:
            queue = (await response.json())["queue"]
        return cls(servers.memory(), files, threads, shared, queue["running"] + queue["waiting"])


async def send_request(session: aiohttp.ClientSession, url: str, rng: random.Random, wrong: list[str]) -> None:
    kind = rng.random()
    address, headers = f"{url}/v1/completions", {"Content-Type": "application/json"}
    if kind < MALFORMED:
        async with session.post(address, data=rng.choice(BAD), headers=headers) as response:
            if response.status not in (400, 404):
                wrong.append(f"malformed: {response.status}")
            await response.read()
        return
    prompt = f"{rng.randrange(999)}+{rng.randrange(999)}="
    body: dict[str, Any] = {"model": "abacus", "prompt": prompt, "max_tokens": 8}
    body["stream"] = rng.random() < 0.5
    if kind < MALFORMED + CANCELLED:
        # Cancelled before or after the first byte.
        body |= {"model": "fable", "prompt": "Once", "max_tokens": 100, "stream": True}
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_read(session, address, body), rng.uniform(0.005, 0.1))
        return
    async with session.post(address, data=json.dumps(body), headers=headers) as response:
        if response.status != 200:
            wrong.append(f"{response.status}: {(await response.text())[:200]}")
        await response.read()


async def _read(session: aiohttp.ClientSession, address: str, body: dict[str, Any]) -> None:
    async with session.post(address, json=body) as response:
        await response.read()


async def send_requests(
    servers: Fleet, session: aiohttp.ClientSession, count: int, clients: int, wrong: list[str]
) -> None:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("requests", total=count)
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await send_request(session, servers.url, random.Random(number), wrong)
                progress.advance(task)

        await asyncio.gather(*(client() for _ in range(clients)))


async def run(servers: Fleet, options: argparse.Namespace) -> bool:
    wrong: list[str] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await send_requests(servers, session, WARM_UP, options.clients, wrong)
        await asyncio.sleep(SETTLE_SECONDS)
        before = await Resources.measure(servers, session)
        await send_requests(servers, session, options.requests, options.clients, wrong)
        await asyncio.sleep(SETTLE_SECONDS)
        after = await Resources.measure(servers, session)
    growth = after.memory / before.memory - 1
    checks = [
        Check("memory, MB", after.memory / 2**20, before.memory / 2**20, growth < 0.05),
        # Keep-alive connections and pool threads vary.
        Check("open files", after.files, before.files, after.files <= before.files + options.clients),
        Check("threads", after.threads, before.threads, after.threads <= before.threads + 8),
        Check("files in /dev/shm", after.shared, before.shared, after.shared == before.shared),
        Check("running or waiting requests", after.requests, before.requests, after.requests == 0),
        Check("wrong responses", len(wrong), 0, not wrong),
    ]
    title = f"{options.requests} requests, {CANCELLED:.0%} cancelled, {MALFORMED:.0%} malformed; bound: before"
    return report_checks(title, checks, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    # A small KV cache, so that the warm-up fills it and its memory does not grow later.
    with fleet(serve=["--kv-cache-tokens", "4096"]) as servers:
        passed = asyncio.run(run(servers, options))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
