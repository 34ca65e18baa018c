"""Load at ten times the capacity: admitted requests are served as before, and the others are refused at once.

    scripts/load overload [--seconds 120] [--times 10] [--clients 16]

First the capacity is measured with clients in a closed loop. Then requests arrive at ten times that rate in an open
loop. Checks: goodput is at least 90 % of the capacity; every refusal is a 429 or 503 with Retry-After and takes at most
50 ms (median); admitted requests take at most twice as long as before; memory grows by at most 5 %; the first request
after the load is served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

from checks import Check, console, report_checks
from servers import Fleet, fleet

TOKENS = 400
MAX_SECONDS = 120.0
RAMP_UP_SECONDS = 5.0
MIN_GOODPUT, MAX_REFUSAL_MS, MAX_SLOWDOWN, MAX_GROWTH = 0.9, 50.0, 2.0, 0.05


@dataclass
class Measurement:
    """Response times in seconds, by kind of response."""

    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    # Failures, and refusals without Retry-After.
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.served) / self.seconds


BODY = json.dumps(
    {"model": "fable", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 1}
)
REQUEST = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()


async def send(port: int, measurement: Measurement) -> None:
    """Uses a plain socket: a client library would need more CPU time than the gateway needs for a refusal."""
    start = time.perf_counter()
    try:
        response = await asyncio.wait_for(_exchange(port), MAX_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        measurement.wrong.append(f"{type(error).__name__}: {error}")
        return
    seconds = time.perf_counter() - start
    head = response.partition(b"\r\n\r\n")[0].lower()
    if head.startswith(b"http/1.1 200"):
        measurement.served.append(seconds)
    elif head.startswith((b"http/1.1 429", b"http/1.1 503")) and b"\r\nretry-after: " in head:
        measurement.refused.append(seconds)
    else:
        measurement.wrong.append(response[:300].decode("utf-8", "replace"))


async def _exchange(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUEST)
        return await reader.read(-1)
    finally:
        writer.close()


async def closed_loop(port: int, clients: int, seconds: float) -> Measurement:
    measurement, start = Measurement(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            await send(port, measurement)

    await asyncio.gather(*(client() for _ in range(clients)))
    measurement.seconds = time.perf_counter() - start
    return measurement


async def open_loop(port: int, rate: float, seconds: float) -> Measurement:
    """Requests arrive at random times, independent of earlier responses."""
    measurement, rng, tasks = Measurement(), random.Random(0), set()
    start = due = time.perf_counter()
    early = 0
    while due - start < seconds:
        if due - start < RAMP_UP_SECONDS:
            early = len(measurement.served)
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(send(port, measurement))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    # Measured from the end of the ramp-up until the load ended.
    measurement.seconds = time.perf_counter() - start - RAMP_UP_SECONDS
    served = len(measurement.served)
    await asyncio.gather(*tasks)
    measurement.served = measurement.served[early:served]
    return measurement


async def run(servers: Fleet, options: argparse.Namespace) -> bool:
    port = int(servers.url.rpartition(":")[2])
    await closed_loop(port, options.clients, 5)
    calm = await closed_loop(port, options.clients, options.calm_seconds)
    console.print(f"capacity: {calm.rate:.1f} requests/s of {TOKENS} tokens, {median_ms(calm.served):.0f} ms each")
    memory = servers.memory()
    rate = options.times * calm.rate
    console.print(f"{rate:.0f} requests/s for {options.seconds:.0f} s …")
    busy = await open_loop(port, rate, options.seconds)
    growth = servers.memory() / memory - 1
    after = Measurement()
    await send(port, after)
    again = await closed_loop(port, options.clients, options.calm_seconds)
    return report(calm, busy, growth, after, again)


def report(calm: Measurement, busy: Measurement, growth: float, after: Measurement, again: Measurement) -> bool:
    # The host's speed varies, so the load is compared with the mean of before and after.
    capacity = (calm.rate + again.rate) / 2
    before = statistics.median([*calm.served, *again.served])
    slowdown, refusal = statistics.median(busy.served) / before, median_ms(busy.refused)
    goodput = busy.rate / capacity
    console.print(f"capacity before {calm.rate:.1f}, after {again.rate:.1f} requests/s")
    checks = [
        Check("goodput, share of the capacity", goodput, MIN_GOODPUT, goodput >= MIN_GOODPUT, "{:.0%}"),
        Check("refusal time, ms", refusal, MAX_REFUSAL_MS, refusal <= MAX_REFUSAL_MS, "{:.1f}"),
        Check("slowdown of admitted requests", slowdown, MAX_SLOWDOWN, slowdown <= MAX_SLOWDOWN, "{:.2f}"),
        Check("memory growth", growth, MAX_GROWTH, growth <= MAX_GROWTH, "{:.1%}"),
        Check("wrong responses", len(busy.wrong), 0, not busy.wrong),
        Check("served after the load", len(after.served), 1, bool(after.served)),
    ]
    return report_checks(f"{len(busy.served)} served, {len(busy.refused)} refused", checks, busy.wrong)


def median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds) if seconds else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--calm-seconds", type=float, default=20)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    # Enough running requests to saturate the machine, and a short queue, since a longer one means longer waits.
    bounds = ["--max-running", str(options.clients), "--max-requests", str(options.clients + options.clients // 2)]
    with fleet(gateway=bounds) as servers:
        # The clients stand for other machines, so they must not slow down the servers.
        os.nice(15)
        passed = asyncio.run(run(servers, options))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
