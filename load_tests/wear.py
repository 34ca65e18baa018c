"""Many short requests, some cancelled and some malformed: nothing is left behind.

    scripts/load wear [--requests 20000] [--clients 32]

A tenth of the requests is left in the midst, a twentieth is malformed. Held to: memory (of all processes, under 5 %),
open files, threads, requests inside, files in /dev/shm: after them as before.
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
from promises import Promise, console, verdict
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
class State:
    """What a fleet holds."""

    memory: int
    files: int
    threads: int
    shared: int
    inside: int

    @classmethod
    async def of(cls, found: Fleet, session: aiohttp.ClientSession) -> State:
        files = threads = 0
        for process in found.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                files, threads = files + process.num_fds(), threads + process.num_threads()
        shared = sum(1 for _ in Path("/dev/shm").glob("tritonlm-*"))
        async with session.get(f"{found.url}/health") as response:
            queue = (await response.json())["queue"]
        return cls(found.memory(), files, threads, shared, queue["running"] + queue["waiting"])


async def one(session: aiohttp.ClientSession, url: str, draw: random.Random, wrong: list[str]) -> None:
    kind = draw.random()
    address, headers = f"{url}/v1/completions", {"Content-Type": "application/json"}
    if kind < MALFORMED:
        async with session.post(address, data=draw.choice(BAD), headers=headers) as response:
            if response.status not in (400, 404):
                wrong.append(f"malformed: {response.status}")
            await response.read()
        return
    prompt = f"{draw.randrange(999)}+{draw.randrange(999)}="
    body: dict[str, Any] = {"model": "abacus", "prompt": prompt, "max_tokens": 8}
    body["stream"] = draw.random() < 0.5
    if kind < MALFORMED + CANCELLED:
        # In the midst: sometimes before the first byte, sometimes after.
        body |= {"model": "fable", "prompt": "Once", "max_tokens": 100, "stream": True}
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_read(session, address, body), draw.uniform(0.005, 0.1))
        return
    async with session.post(address, data=json.dumps(body), headers=headers) as response:
        if response.status != 200:
            wrong.append(f"{response.status}: {(await response.text())[:200]}")
        await response.read()


async def _read(session: aiohttp.ClientSession, address: str, body: dict[str, Any]) -> None:
    async with session.post(address, json=body) as response:
        await response.read()


async def many(found: Fleet, session: aiohttp.ClientSession, count: int, clients: int, wrong: list[str]) -> None:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("requests", total=count)
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await one(session, found.url, random.Random(number), wrong)
                progress.advance(task)

        await asyncio.gather(*(client() for _ in range(clients)))


async def run(found: Fleet, options: argparse.Namespace) -> bool:
    wrong: list[str] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await many(found, session, WARM_UP, options.clients, wrong)
        await asyncio.sleep(SETTLE_SECONDS)
        before = await State.of(found, session)
        await many(found, session, options.requests, options.clients, wrong)
        await asyncio.sleep(SETTLE_SECONDS)
        after = await State.of(found, session)
    growth = after.memory / before.memory - 1
    promises = [
        Promise("memory, MB", after.memory / 2**20, before.memory / 2**20, growth < 0.05),
        # Connections that are kept, and threads of pools, come and go.
        Promise("open files", after.files, before.files, after.files <= before.files + options.clients),
        Promise("threads", after.threads, before.threads, after.threads <= before.threads + 8),
        Promise("files in /dev/shm", after.shared, before.shared, after.shared == before.shared),
        Promise("requests inside", after.inside, before.inside, after.inside == 0),
        Promise("wrong answers", len(wrong), 0, not wrong),
    ]
    title = f"{options.requests} requests, {CANCELLED:.0%} cancelled, {MALFORMED:.0%} malformed; bound: as before"
    return verdict(title, promises, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    # A small cache is full, and all its memory in use, when the warm-up is over.
    with fleet(serve=["--kv-cache-tokens", "4096"]) as found:
        kept = asyncio.run(run(found, options))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
