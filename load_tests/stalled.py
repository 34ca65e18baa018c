"""A thousand readers who connect, ask for a stream and read nothing: nobody else notices, and memory stays bounded.

    scripts/load stalled [--readers 1000] [--clients 4]

Some clients with another key ask in a closed loop, before and beside the stalled readers. Held to: every one of their
requests is answered; memory of all processes grows by at most 64 KiB for each reader; when it is over, nothing is
inside any more.
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
from promises import Promise, console, verdict
from servers import Fleet, fleet

SECONDS, WAIT_SECONDS = 20.0, 90.0
MOST_BYTES = 64 * 1024
WARM_UP = 256
BODY = {"model": "fable", "prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}


def stall(url: str, key: str) -> socket.socket:
    """A connection that has asked for a long stream, and whose window is small."""
    host, port = url.removeprefix("http://").split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.connect((host, int(port)))
    body = json.dumps(BODY)
    made.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    made.setblocking(False)
    return made


async def others(
    session: aiohttp.ClientSession, url: str, clients: int, seconds: float
) -> tuple[list[float], list[str]]:
    """Seconds of each of their requests, and what was not answered."""
    took: list[float] = []
    wrong: list[str] = []
    start = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - start < seconds:
            begun = time.perf_counter()
            body = {"model": "abacus", "prompt": f"{number}+1=", "max_tokens": 8, "temperature": 0}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                text = (
                    (await response.json())["choices"][0]["text"] if response.status == 200 else await response.text()
                )
                (took if response.status == 200 else wrong).append(
                    time.perf_counter() - begun if response.status == 200 else f"{response.status}: {text[:200]}"
                )

    await asyncio.gather(*(client(number) for number in range(clients)))
    return took, wrong


async def whole(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(f"{url}/v1/completions", json=BODY) as response:
        await response.read()


async def run(found: Fleet, options: argparse.Namespace, key: str, others_key: str) -> bool:
    timeout, connector = aiohttp.ClientTimeout(total=WAIT_SECONDS), aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {others_key}"}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        # The cache's memory comes into use once, whoever reads.
        await asyncio.gather(*(whole(session, found.url) for _ in range(WARM_UP)))
        calm, _ = await others(session, found.url, options.clients, 5)
        memory = found.memory()
        stalled = []
        for _ in range(options.readers):
            stalled.append(stall(found.url, key))
            await asyncio.sleep(0.002)
        beside, wrong = await others(session, found.url, options.clients, SECONDS)
        growth = (found.memory() - memory) / options.readers
        inside = await _inside(found, session)
        for made in stalled:
            made.close()
    medians = [1000 * statistics.median(seconds) for seconds in (calm, beside)]
    console.print("others' requests took {:.0f} ms at the median before, {:.0f} ms beside them".format(*medians))
    promises = [
        Promise("requests of others that were not answered", len(wrong), 0, not wrong),
        Promise("memory for each stalled reader, KiB", growth / 1024, MOST_BYTES / 1024, growth <= MOST_BYTES),
        Promise("requests inside in the end", inside, 0, inside == 0),
    ]
    return verdict(f"{options.readers} stalled readers", promises, wrong)


async def _inside(found: Fleet, session: aiohttp.ClientSession) -> int:
    """What runs or waits, when everything has had its time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(aiohttp.ClientError, KeyError, TypeError):
            async with session.get(f"{found.url}/v1/models") as response:
                models = (await response.json())["data"]
                inside = sum(model["running"] + model["waiting"] for model in models if model["state"] == "ready")
            if not inside or time.monotonic() > deadline:
                return int(inside)
        await asyncio.sleep(0.5)


def made_key(name: str, *options: str) -> str:
    command = [sys.executable, "-m", "tritonlm.cli", "keys", "create", name, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = ["--keys", f"{folder}/keys.json"]
        secrets = [made_key(name, *keys) for name in ("stalled", "others")]
        with fleet(
            serve=["--kv-cache-tokens", "8192"], gateway=[*keys, "--max-requests", "2000", "--reader-seconds", "10"]
        ) as found:
            kept = asyncio.run(run(found, options, *secrets))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
