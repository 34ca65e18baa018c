"""Kills and stops processes under load, and compares every response with that of a run without faults.

    scripts/chaos [--faults 40] [--clients 64] [--tritons 2] [--pause 5] [--seed 0]

Clients request completions from both bundled language models, greedy and with seeds, with and without streams, half of
them with structured outputs. Meanwhile processes are killed (SIGKILL) or stopped (SIGSTOP) at random times: a model's
tokenize, generate or detokenize, or a whole Triton. Every request must be answered with the same text, usage and finish
reason as in a run without faults, and with structured outputs the text must follow its form. The report lists the
faults and the longest pause of a stream.
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
from forms import MOST_TOKENS, STORIES, SUMS, Form
from rich.console import Console
from rich.table import Table
from servers import Fleet, fleet

KINDS = ("tokenize", "generate", "detokenize", "triton")
# The prefixes of the two LMs' parts; the first LM has none.
MODELS = ("", "fable")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
# Stops are rarer, since the supervisor needs time to detect a hanging process.
WEIGHTS = (3, 1)
MAX_SECONDS = 120.0

console = Console()


@dataclass(frozen=True)
class Request:
    body: str
    # What the answer must follow, in half of the requests. The body has it, too.
    form: Form | None = field(default=None, compare=False)

    @classmethod
    def create(cls, rng: random.Random) -> Request:
        if rng.random() < 0.3:
            one, other = rng.randrange(1000), rng.randrange(1000)
            body: dict[str, Any] = {"model": "abacus", "prompt": f"{one}+{other}=", "max_tokens": 8}
        else:
            body = {"model": "fable", "prompt": rng.choice(["Once upon a time", "The fox", "One day a mole"])}
            body |= {"max_tokens": rng.randrange(100, MOST_TOKENS), "ignore_eos": True}
        form = rng.choice(STORIES if body["model"] == "fable" else SUMS) if rng.random() < 0.5 else None
        if form:
            body["structured_outputs"] = form.structured_outputs
            if form.is_json:
                body["max_tokens"] = MOST_TOKENS
        if rng.random() < 0.5:
            body |= {"temperature": 0}
        else:
            body |= {"temperature": 1, "seed": rng.randrange(2**31)}
        if rng.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return cls(json.dumps(body), form)

    def mistake(self, response: Response, expected: Response) -> str:
        """Why the response is wrong; empty: it is not."""
        if response != expected:
            return f"expected {expected}, got {response}"
        error = self.form.error(response.text) if self.form else ""
        return f"{response} does not follow its form: {error}" if error else ""


@dataclass(frozen=True)
class Response:
    text: str
    finish_reason: str
    tokens: tuple[int, int]


@dataclass
class Result:
    answered: int = 0
    # Of them with structured outputs.
    constrained: int = 0
    wrong: list[str] = field(default_factory=list)
    # The longest pause of each stream, and when it began.
    pauses: list[tuple[float, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)


async def send(http: httpx.AsyncClient, url: str, request: Request) -> tuple[Response, tuple[float, float]]:
    """The response, and the longest pause between two of its chunks with the time when it began."""
    last, longest, text, reason, usage = 0.0, (0.0, 0.0), "", "", {}
    headers = {"Content-Type": "application/json"}
    async with http.stream("POST", f"{url}/v1/completions", content=request.body, headers=headers) as response:
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
    return Response(text, reason, (usage["prompt_tokens"], usage["completion_tokens"])), longest


async def client(
    http: httpx.AsyncClient, url: str, expected: dict[Request, Response], result: Result, rng: random.Random,
    stop: asyncio.Event,
) -> None:  # fmt: skip
    requests = list(expected)
    while not stop.is_set():
        request = rng.choice(requests)
        try:
            response, pause = await asyncio.wait_for(send(http, url, request), MAX_SECONDS)
        except Exception as error:
            result.wrong.append(f"{type(error).__name__}: {error} ({request.body})")
            continue
        result.answered += 1
        result.pauses.append(pause)
        result.constrained += request.form is not None
        if mistake := request.mistake(response, expected[request]):
            result.wrong.append(f"{mistake} ({request.body})")


async def inject_faults(servers: Fleet, faults: int, pause: float, result: Result, rng: random.Random) -> None:
    while len(result.faults) < faults:
        await asyncio.sleep(rng.uniform(0.4, 1.6) * pause)
        kind, model = rng.choice(KINDS), rng.choice(MODELS)
        action = rng.choices(list(SIGNALS), WEIGHTS)[0]
        number = rng.randrange(len(servers.tritons))
        victim = servers.tritons[number].part(kind, "" if kind == "triton" else model)
        if victim is None:
            # It is being restarted.
            continue
        name = kind if kind == "triton" else f"{model}-{kind}" if model else kind
        try:
            victim.send_signal(SIGNALS[action])
        except psutil.NoSuchProcess:
            continue
        result.faults.append((time.monotonic(), f"{kind} {action}"))
        console.print(f"  fault {len(result.faults)}: {name} of Triton {number} {action}; {result.answered} answered")


async def run(servers: Fleet, options: argparse.Namespace) -> Result:
    rng = random.Random(options.seed)
    requests = list({Request.create(rng) for _ in range(3 * options.clients // 2)})
    result, stop = Result(), asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=MAX_SECONDS, limits=limits, trust_env=False) as http:
        console.print(f"{len(requests)} requests without faults …")
        limit = asyncio.Semaphore(16)

        async def send_undisturbed(request: Request) -> Response:
            async with limit:
                return (await send(http, servers.url, request))[0]

        responses = await asyncio.gather(*map(send_undisturbed, requests))
        expected = dict(zip(requests, responses, strict=True))
        console.print(f"{options.clients} clients, {options.faults} faults …")
        clients = [
            asyncio.create_task(client(http, servers.url, expected, result, random.Random(f"{options.seed} {n}"), stop))
            for n in range(options.clients)
        ]  # fmt: skip
        await inject_faults(servers, options.faults, options.pause, result, rng)
        # Let the requests that the last fault interrupted finish.
        await asyncio.sleep(5)
        stop.set()
        await asyncio.gather(*clients)
    return result


def report(result: Result) -> None:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for moment, kind in result.faults:
        affected = [pause for pause, began in result.pauses if abs(began - moment) <= 1]
        by_kind[kind].append(max(affected, default=0.0))
    table = Table(title="longest pause of a stream that began within a second of a fault, in seconds")
    for name in ("fault", "times", "median", "longest"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind, pauses in sorted(by_kind.items()):
        table.add_row(kind, str(len(pauses)), f"{sorted(pauses)[len(pauses) // 2]:.1f}", f"{max(pauses):.1f}")
    console.print(table)
    console.print(f"longest pause in any stream: {max(result.pauses)[0]:.1f} s")
    console.print(f"{result.constrained} of {result.answered} answers had to follow a form")
    console.print(f"{result.answered} requests answered as without faults; {len(result.wrong)} were not")
    for wrong in result.wrong[:10]:
        console.print(f"  {wrong}", style="red", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tritons", type=int, default=2)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console.print(f"starting {options.tritons} Tritons and a gateway …")
    with fleet(options.tritons) as servers:
        result = asyncio.run(run(servers, options))
    report(result)
    sys.exit(1 if result.wrong or not result.answered else 0)


if __name__ == "__main__":
    main()
