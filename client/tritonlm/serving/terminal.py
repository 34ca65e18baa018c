"""What a person at the terminal sees while a Triton starts, serves and stops. It knows words, not processes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .control import reachable_host
from .errors import ServingError
from .settings import Settings

_stderr = Console(stderr=True)


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
    gateway = f"{reachable_host(settings.host)}:{settings.port}"
    if settings.gateway:
        lines += [f"  API      http://{gateway}/v1", f"  docs     http://{gateway}/docs"]
    lines += [
        f"  Triton   http://{triton}:{settings.http_port}, gRPC {triton}:{settings.grpc_port}, "
        f"metrics http://{triton}:{settings.metrics_port}/metrics",
        f"  log      {log if log is not None else 'standard error'}",
        "",
        "Try it (Ctrl-C stops the server):",
    ]
    name = next(iter(reports))
    prompt: dict[str, object] = {"max_tokens": 20, "temperature": 0}
    if settings.gateway:
        body = {"model": name, "prompt": "Once upon a time", **prompt}
        lines.append(f"  curl {gateway}/v1/completions -d '{json.dumps(body)}'")
        lines.append(f"  curl -N {gateway}/v1/completions -d '{json.dumps({**body, 'stream': True})}'")
    else:
        body = {"text_input": "Once upon a time", **prompt}
        url = f"{triton}:{settings.http_port}/v2/models/{name}"
        lines.append(f"  curl -N {url}/generate_stream -d '{json.dumps({**body, 'stream': True})}'")
        lines.append(f"  curl {url}/generate -d '{json.dumps(body)}'")
    return "\n".join(lines) + "\n"
