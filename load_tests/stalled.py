"""A thousand clients request a stream and never read it: other clients are not affected, and memory stays bounded.

    scripts/load stalled [--readers 1000] [--clients 4]

Clients with another key send requests in a closed loop, before and during the stalled readers. Checks: each of their
requests is answered; the memory of all processes grows by at most 64 KiB per reader; at the end no request runs or
waits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import aiohttp
from checks import Check, console, report_checks
from servers import Fleet, fleet

SECONDS, WAIT_SECONDS = 20.0, 90.0
MAX_BYTES = 64 * 1024
WARM_UP = 256
BODY = {"model": "fable", "prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}


def connect_stalled(url: str, key: str) -> socket.socket:
    """A connection with a small receive window that has requested a long stream."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    body = json.dumps(BODY)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    connection.setblocking(False)
    return connection


async def run_others(
    session: aiohttp.ClientSession, url: str, clients: int, seconds: float
) -> tuple[list[float], list[str]]:
    """The response times of the other clients in seconds, and the failed responses."""
    times: list[float] = []
    wrong: list[str] = []
    start = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            body = {"model": "abacus", "prompt": f"{number}+1=", "max_tokens": 8, "temperature": 0}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                text = (
                    (await response.json())["choices"][0]["text"] if response.status == 200 else await response.text()
                )
                if response.status == 200:
                    times.append(time.perf_counter() - sent)
                else:
                    wrong.append(f"{response.status}: {text[:200]}")

    await asyncio.gather(*(client(number) for number in range(clients)))
    return times, wrong


async def read_stream(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(f"{url}/v1/completions", json=BODY) as response:
        await response.read()


async def run(servers: Fleet, options: argparse.Namespace, key: str, others_key: str) -> bool:
    timeout, connector = aiohttp.ClientTimeout(total=WAIT_SECONDS), aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {others_key}"}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        # Fill the KV cache first, so that its memory does not count as growth.
        await asyncio.gather(*(read_stream(session, servers.url) for _ in range(WARM_UP)))
        before, _ = await run_others(session, servers.url, options.clients, 5)
        memory = servers.memory()
        stalled = []
        for _ in range(options.readers):
            stalled.append(connect_stalled(servers.url, key))
            await asyncio.sleep(0.002)
        during, wrong = await run_others(session, servers.url, options.clients, SECONDS)
        growth = (servers.memory() - memory) / options.readers
        remaining = await _remaining_requests(servers, session)
        for connection in stalled:
            connection.close()
    medians = [1000 * statistics.median(seconds) for seconds in (before, during)]
    console.print("requests of other clients (median): {:.0f} ms before, {:.0f} ms during the test".format(*medians))
    checks = [
        Check("failed requests of other clients", len(wrong), 0, not wrong),
        Check("memory per stalled reader, KiB", growth / 1024, MAX_BYTES / 1024, growth <= MAX_BYTES),
        Check("running or waiting requests at the end", remaining, 0, remaining == 0),
    ]
    return report_checks(f"{options.readers} stalled readers", checks, wrong)


async def _remaining_requests(servers: Fleet, session: aiohttp.ClientSession) -> int:
    """The number of running and waiting requests, after a limited wait for zero."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(aiohttp.ClientError, KeyError, TypeError):
            async with session.get(f"{servers.url}/v1/models") as response:
                models = (await response.json())["data"]
                count = sum(model["running"] + model["waiting"] for model in models if model["state"] == "ready")
            if not count or time.monotonic() > deadline:
                return int(count)
        await asyncio.sleep(0.5)


def create_key(name: str, *options: str) -> str:
    command = [sys.executable, "-m", "tritonlm.cli", "keys", "create", name, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = ["--keys", f"{folder}/keys.json"]
        secrets = [create_key(name, *keys) for name in ("stalled", "others")]
        with fleet(
            serve=["--kv-cache-tokens", "8192"], gateway=[*keys, "--max-requests", "2000", "--reader-seconds", "10"]
        ) as servers:
            passed = asyncio.run(run(servers, options, *secrets))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
