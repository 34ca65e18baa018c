"""One model behind `tritonlm serve`, and the requests of a soak test to it. This module knows no checks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import Tokenizer

STOP_SECONDS = 60.0
PROSE = (
    "The lighthouse stood at the end of the pier, and at dusk its keeper climbed the 142 steps to light the lamp. "
    "He had done so for thirty-one years; only once, in the winter of 1962, had the storm kept him below. "
)


class CheckFailed(Exception):
    """A check has failed; the message says why."""


@dataclass
class Server:
    """A running server with one model, and the requests to it."""

    model: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    tokenizer: Tokenizer
    seconds: float
    log: Path

    def body(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return body | options

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json=self.body(prompt, max_tokens, **options))
        if not response.is_success:
            raise CheckFailed(f"{response.status_code} {response.text[:150]}")
        completion: dict[str, Any] = response.json()
        return completion

    def text(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> str:
        return str(self.complete(prompt, max_tokens, **options)["choices"][0]["text"])

    def stream(self, prompt: str, max_tokens: int, on_chunk: Callable[[], None], **options: Any) -> str:
        text = ""
        body = self.body(prompt, max_tokens, stream=True, **options)
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise CheckFailed(str(event["error"])[:150])
                    text += "".join(choice["text"] for choice in event["choices"])
                    on_chunk()
        return text

    def make_prompt(self, tokens: int, number: int) -> list[int]:
        """A prompt of `tokens` tokens; prompts with different numbers share no prefix."""
        ids: list[int] = []
        chapter = 0
        while len(ids) < tokens:
            chapter += 1
            ids += self.tokenizer.encode(f"{number}: chapter {chapter}. {PROSE}").ids
        return ids[:tokens]

    def engine_process(self) -> psutil.Process:
        """The model's generate process."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if len(command) > 2 and command[-2] == f"{self.model}-generate_0_0":
                    return process
        raise CheckFailed("there is no generate process")

    def resident_gb(self) -> float:
        with contextlib.suppress(psutil.Error, CheckFailed):
            return float(self.engine_process().memory_info().rss / 1e9)
        return math.nan

    def wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise CheckFailed(f"the server ended: {' | '.join(self.log.read_text().splitlines()[-3:])}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health/ready", timeout=10).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise CheckFailed(f"the server is not ready after {seconds:.0f} s")
            time.sleep(0.2)


@contextlib.contextmanager
def serving(
    name: str,
    folder: Path,
    seconds: float,
    dtype: str = "auto",
    weights: str = "full",
    registry: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `tritonlm serve` on loopback, with further environment `variables`, and stop it at the end.

    With `registry` it serves the model of that file, whose checkpoint is `folder`.
    """
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = free_ports(4)
        port_options = zip(("--port", "--http-port", "--grpc-port", "--metrics-port"), map(str, ports), strict=True)
        models = ("--registry", str(registry), "--load", name) if registry else ("--checkpoint", f"{name}={folder}")
        command = [sys.executable, "-m", "tritonlm.cli", "serve", *models, "--device", "cpu"]
        command += ["--dtype", dtype, "--weights", weights, *(part for option in port_options for part in option)]
        # The checks take longer than the default limits allow.
        environment = os.environ | {
            "TRITONLM_KEYS": str(work / "keys.json"),
            "TRITONLM_MAX_SECONDS": str(int(seconds)),
            "TRITONLM_QUEUE_SECONDS": str(int(seconds)),
            **(variables or {}),
        }
        log = work / "log.txt"
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        stack.callback(stop, process)
        limits = httpx.Limits(max_connections=None)
        base = f"http://127.0.0.1:{ports[0]}"
        http = stack.enter_context(httpx.Client(base_url=base, timeout=seconds, trust_env=False, limits=limits))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        yield Server(name, process, http, tokenizer, seconds, log)


def stop(process: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
    process.wait(STOP_SECONDS)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
