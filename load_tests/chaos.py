"""Kills and stops processes under load, and holds every answer to what it is without a fault.

    scripts/chaos [--faults 40] [--clients 64] [--tritons 2] [--pause 5] [--seed 0]

Clients ask for continuations, greedy and with seeds, streamed and whole, of both bundled language models. Meanwhile one
process after the other, at random moments, is killed (SIGKILL) or stopped (SIGSTOP): a model's tokenize, generate or
detokenize, or a Triton as a whole. Every request must be answered, with exactly the text, the usage and the finish
reason of an undisturbed run. What is told in the end: the faults, and the longest pause that a caller saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from servers import Fleet, fleet

KINDS = ("tokenize", "generate", "detokenize", "triton")
# Parts of the LM that has no prefix, and of the other one.
MODELS = ("", "fable")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
# A stopped process must be seen to hang first.
WEIGHTS = (3, 1)
LONGEST_SECONDS = 120.0

console = Console()


@dataclass(frozen=True)
class Ask:
    body: str

    @classmethod
    def made(cls, draw: random.Random) -> Ask:
        if draw.random() < 0.3:
            one, other = draw.randrange(1000), draw.randrange(1000)
            body: dict[str, Any] = {"model": "abacus", "prompt": f"{one}+{other}=", "max_tokens": 8}
        else:
            body = {"model": "fable", "prompt": draw.choice(["Once upon a time", "The fox", "One day a mole"])}
            body |= {"max_tokens": draw.randrange(100, 400), "ignore_eos": True}
        if draw.random() < 0.5:
            body |= {"temperature": 0}
        else:
            body |= {"temperature": 1, "seed": draw.randrange(2**31)}
        if draw.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return cls(json.dumps(body))


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    tokens: tuple[int, int]


@dataclass
class Result:
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    # The longest that each stream's reader waited for a next piece, and when that began.
    pauses: list[tuple[float, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)


async def ask(http: httpx.AsyncClient, url: str, wanted: Ask) -> tuple[Answer, tuple[float, float]]:
    """The answer; and the longest time from one piece of it to the next, and when that began."""
    last, longest, text, reason, usage = 0.0, (0.0, 0.0), "", "", {}
    headers = {"Content-Type": "application/json"}
    async with http.stream("POST", f"{url}/v1/completions", content=wanted.body, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        streamed = response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if streamed and (not line.startswith("data:") or line.endswith("[DONE]")):
                continue
            now = time.monotonic()
            longest, last = max(longest, (now - last, last)) if last else longest, now
            event = json.loads(line.removeprefix("data:"))
            if "error" in event:
                raise RuntimeError(f"in the stream: {event['error']['message']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text, reason = text + choice["text"], choice["finish_reason"] or reason
    return Answer(text, reason, (usage["prompt_tokens"], usage["completion_tokens"])), longest


async def client(
    http: httpx.AsyncClient, url: str, expected: dict[Ask, Answer], result: Result, draw: random.Random,
    stop: asyncio.Event,
) -> None:  # fmt: skip
    asks = list(expected)
    while not stop.is_set():
        wanted = draw.choice(asks)
        try:
            found, pause = await asyncio.wait_for(ask(http, url, wanted), LONGEST_SECONDS)
        except Exception as error:
            result.wrong.append(f"{type(error).__name__}: {error} ({wanted.body})")
            continue
        result.answered += 1
        result.pauses.append(pause)
        if found != expected[wanted]:
            result.wrong.append(f"expected {expected[wanted]}, got {found} ({wanted.body})")


async def break_things(found: Fleet, faults: int, pause: float, result: Result, draw: random.Random) -> None:
    while len(result.faults) < faults:
        await asyncio.sleep(draw.uniform(0.4, 1.6) * pause)
        kind, model = draw.choice(KINDS), draw.choice(MODELS)
        how = draw.choices(list(SIGNALS), WEIGHTS)[0]
        number = draw.randrange(len(found.tritons))
        victim = found.tritons[number].part(kind, "" if kind == "triton" else model)
        if victim is None:
            # It is just being brought back.
            continue
        name = kind if kind == "triton" else f"{model}-{kind}" if model else kind
        try:
            victim.send_signal(SIGNALS[how])
        except psutil.NoSuchProcess:
            continue
        result.faults.append((time.monotonic(), f"{kind} {how}"))
        console.print(f"  fault {len(result.faults)}: {name} of Triton {number} {how}; {result.answered} answered")


async def run(found: Fleet, options: argparse.Namespace) -> Result:
    draw = random.Random(options.seed)
    asks = list({Ask.made(draw) for _ in range(3 * options.clients // 2)})
    result, stop = Result(), asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=LONGEST_SECONDS, limits=limits, trust_env=False) as http:
        console.print(f"{len(asks)} requests without a fault …")
        places = asyncio.Semaphore(16)

        async def undisturbed(wanted: Ask) -> Answer:
            async with places:
                return (await ask(http, found.url, wanted))[0]

        answers = await asyncio.gather(*map(undisturbed, asks))
        expected = dict(zip(asks, answers, strict=True))
        console.print(f"{options.clients} clients, {options.faults} faults …")
        clients = [
            asyncio.create_task(client(http, found.url, expected, result, random.Random(f"{options.seed} {n}"), stop))
            for n in range(options.clients)
        ]  # fmt: skip
        await break_things(found, options.faults, options.pause, result, draw)
        # The last one's victims too are to be seen whole.
        await asyncio.sleep(5)
        stop.set()
        await asyncio.gather(*clients)
    return result


def report(result: Result) -> None:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for moment, kind in result.faults:
        touched = [pause for pause, began in result.pauses if abs(began - moment) <= 1]
        by_kind[kind].append(max(touched, default=0.0))
    table = Table(title="faults, and the longest pause of a stream that began within a second of one, s")
    for name in ("fault", "times", "median", "longest"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind, pauses in sorted(by_kind.items()):
        table.add_row(kind, str(len(pauses)), f"{sorted(pauses)[len(pauses) // 2]:.1f}", f"{max(pauses):.1f}")
    console.print(table)
    console.print(f"longest pause in any stream: {max(result.pauses)[0]:.1f} s")
    console.print(f"{result.answered} requests answered as without a fault; {len(result.wrong)} were not")
    for wrong in result.wrong[:10]:
        console.print(f"  {wrong}", style="red", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tritons", type=int, default=2)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two faults, on the average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console.print(f"starting {options.tritons} Tritons and a gateway …")
    with fleet(options.tritons) as found:
        result = asyncio.run(run(found, options))
    report(result)
    sys.exit(1 if result.wrong or not result.answered else 0)


if __name__ == "__main__":
    main()
