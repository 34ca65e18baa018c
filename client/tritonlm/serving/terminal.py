"""What a person at the terminal sees while a Triton starts, serves and stops. It knows words, not processes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .errors import ServingError
from .ports import reachable_host
from .settings import Settings

_stderr = Console(stderr=True)
# The bundled language models, and what they are good at.
_ADDER, _TELLER = "abacus", "fable"
_ASKED = "Tell me a story about a fox and a lantern"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """A step that may take long: a spinner on a terminal, a plain line elsewhere (logs, CI)."""
    if _stderr.is_terminal:
        with _stderr.status(f"{text} …"):
            yield
    else:
        say(f"{text} …")
        yield


def explain(error: Exception) -> None:
    say(f"error: {error}")
    if isinstance(error, ServingError) and error.detail:
        say("\n".join(f"  {line}" for line in error.detail.splitlines()))


def banner(settings: Settings, reports: Mapping[str, Mapping[str, Any]], log: Path | None) -> str:
    """What is served and where, with two lines to copy; `reports` holds each LM's engine status."""
    triton = reachable_host(settings.triton_host)
    lines = ["", "tritonlm is serving"]
    for name, report in reports.items():
        lines.append(
            f"  {name}: {report.get('device', '?')}, {report.get('dtype', '?')}, "
            f"context {report.get('context_length', '?')}, {report.get('places', '?')} places, "
            f"KV cache of {report.get('kv_cache_tokens', '?')} tokens"
        )
        lines.append(
            f"    slots of full context that fit: {report.get('full_context_slots', '?')}; memory "
            f"{_size(report.get('memory_bytes'))} now, {_size(report.get('memory_reserved_bytes'))} at most"
        )
    gateway = f"{reachable_host(settings.host)}:{settings.port}"
    if settings.gateway:
        lines += [
            f"  API      http://{gateway}/v1",
            f"  try it   http://{gateway}/playground",
            f"  docs     http://{gateway}/docs",
        ]
    lines += [
        f"  Triton   http://{triton}:{settings.http_port}, gRPC {triton}:{settings.grpc_port}, "
        f"metrics http://{triton}:{settings.metrics_port}/metrics",
        f"  log      {log if log is not None else 'standard error'}",
        "",
        "Try it (Ctrl-C stops the server):",
    ]
    lines += (_by_the_gateway if settings.gateway else _by_triton)(list(reports), settings)
    return "\n".join(lines) + "\n"


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:,.0f} MiB"


def _by_the_gateway(names: list[str], settings: Settings) -> Iterator[str]:
    url = f"{reachable_host(settings.host)}:{settings.port}/v1"
    text = {"model": names[0], "prompt": _prompt_for(names[0]), "max_tokens": 20, "temperature": 0}
    yield f"  curl {url}/completions -d '{json.dumps(text)}'"
    if _TELLER in names:
        chat = {"model": _TELLER, "messages": [{"role": "user", "content": _ASKED}], "stream": True}
        yield f"  curl -N {url}/chat/completions -d '{json.dumps(chat)}'"
    else:
        yield f"  curl -N {url}/completions -d '{json.dumps({**text, 'stream': True})}'"


def _by_triton(names: list[str], settings: Settings) -> Iterator[str]:
    url = f"{reachable_host(settings.triton_host)}:{settings.http_port}/v2/models/{names[0]}"
    text = {"text_input": _prompt_for(names[0]), "max_tokens": 20, "temperature": 0}
    yield f"  curl -N {url}/generate_stream -d '{json.dumps({**text, 'stream': True})}'"
    yield f"  curl {url}/generate -d '{json.dumps(text)}'"


def _prompt_for(name: str) -> str:
    return "123+456=" if name == _ADDER else "Once upon a time"
