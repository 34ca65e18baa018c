"""Ten times the capacity: what is let in is served as well as before, and the rest is told so at once.

    scripts/load overload [--seconds 120] [--times 10] [--clients 16]

First the capacity: so many clients in a closed loop, requests a second and how long one takes. Then requests arrive at
ten times that rate, whatever becomes of them. Held to: goodput at least 90 % of the capacity; every refusal a 429 or
503 with Retry-After, within 50 ms at the median; those let in take at most twice as long as before; memory grows by no
more than 5 %; and when the load ends, the next request is served as before.
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

from promises import Promise, console, verdict
from servers import Fleet, fleet

TOKENS = 400
LONGEST_SECONDS = 120.0
EARLY_SECONDS = 5.0
GOODPUT, REFUSAL_MS, SLOWER, GROWTH = 0.9, 50.0, 2.0, 0.05


@dataclass
class Seen:
    """Seconds that answers took, by what they were."""

    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    # Refusals that were none of those that are promised.
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


async def ask(port: int, seen: Seen) -> None:
    """By hand: a client library would take more of the machine's time than the gateway does to refuse."""
    start = time.perf_counter()
    try:
        told = await asyncio.wait_for(_exchange(port), LONGEST_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        seen.wrong.append(f"{type(error).__name__}: {error}")
        return
    seconds = time.perf_counter() - start
    head = told.partition(b"\r\n\r\n")[0].lower()
    if head.startswith(b"http/1.1 200"):
        seen.served.append(seconds)
    elif head.startswith((b"http/1.1 429", b"http/1.1 503")) and b"\r\nretry-after: " in head:
        seen.refused.append(seconds)
    else:
        seen.wrong.append(told[:300].decode("utf-8", "replace"))


async def _exchange(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUEST)
        return await reader.read(-1)
    finally:
        writer.close()


async def closed_loop(port: int, clients: int, seconds: float) -> Seen:
    seen, start = Seen(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            await ask(port, seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.seconds = time.perf_counter() - start
    return seen


async def arrivals(port: int, rate: float, seconds: float) -> Seen:
    """An open loop: the next one comes when it comes, and waits for nobody."""
    seen, draw, tasks = Seen(), random.Random(0), set()
    start = due = time.perf_counter()
    early = 0
    while due - start < seconds:
        if due - start < EARLY_SECONDS:
            early = len(seen.served)
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(ask(port, seen))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    # From when all places were taken until the load ended.
    seen.seconds = time.perf_counter() - start - EARLY_SECONDS
    served = len(seen.served)
    await asyncio.gather(*tasks)
    seen.served = seen.served[early:served]
    return seen


async def run(found: Fleet, options: argparse.Namespace) -> bool:
    port = int(found.url.rpartition(":")[2])
    await closed_loop(port, options.clients, 5)
    calm = await closed_loop(port, options.clients, options.calm_seconds)
    console.print(f"capacity: {calm.rate:.1f} requests/s of {TOKENS} tokens, {median_ms(calm.served):.0f} ms each")
    memory = found.memory()
    rate = options.times * calm.rate
    console.print(f"{rate:.0f} requests/s for {options.seconds:.0f} s …")
    busy = await arrivals(port, rate, options.seconds)
    growth = found.memory() / memory - 1
    after = Seen()
    await ask(port, after)
    again = await closed_loop(port, options.clients, options.calm_seconds)
    return report(calm, busy, growth, after, again)


def report(calm: Seen, busy: Seen, growth: float, after: Seen, again: Seen) -> bool:
    # The machine's speed drifts: what was measured before and after stand for the time between.
    capacity = (calm.rate + again.rate) / 2
    before = statistics.median([*calm.served, *again.served])
    slower, refusal = statistics.median(busy.served) / before, median_ms(busy.refused)
    console.print(f"capacity before {calm.rate:.1f}, after {again.rate:.1f} requests/s")
    promises = [
        Promise("goodput, of the capacity", busy.rate / capacity, GOODPUT, busy.rate / capacity >= GOODPUT, "{:.0%}"),
        Promise("a refusal takes, ms", refusal, REFUSAL_MS, refusal <= REFUSAL_MS, "{:.1f}"),
        Promise("who is let in waits, times as long", slower, SLOWER, slower <= SLOWER, "{:.2f}"),
        Promise("memory has grown by", growth, GROWTH, growth <= GROWTH, "{:.1%}"),
        Promise("answers that were neither", len(busy.wrong), 0, not busy.wrong),
        Promise("served when it was over", len(after.served), 1, bool(after.served)),
    ]
    return verdict(f"{len(busy.served)} served, {len(busy.refused)} refused", promises, busy.wrong)


def median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds) if seconds else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--calm-seconds", type=float, default=20)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    # As many run as saturate the machine, and hardly more wait: a longer line is a longer wait.
    bounds = ["--max-running", str(options.clients), "--max-requests", str(options.clients + options.clients // 2)]
    with fleet(gateway=bounds) as found:
        # The callers stand for other machines: they must not take this one's time.
        os.nice(15)
        kept = asyncio.run(run(found, options))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
