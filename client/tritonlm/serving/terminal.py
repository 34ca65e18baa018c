"""Terminal output of `tritonlm serve`: lines, steps, errors, the banner. It does not know processes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tritonlm.contract.load_progress import Loaded

from .errors import ServingError
from .ports import reachable_host
from .settings import Settings

_UPDATE_SECONDS = 2.0
# The bundled language models: sums and stories.
_ADDER, _STORYTELLER = "abacus", "fable"
_CHAT_PROMPT = "What is the capital of France?"
_STORY_PROMPT = "Tell me a story about a fox and a lantern"


def say(text: str) -> None:
    _write(text, sys.stderr)


def show_banner(text: str) -> None:
    _write(text, sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    """A server goes on when nobody reads its messages any more, and when the disk of its log is full."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[Callable[[str], None]]:
    """A step that may take long, and a function that updates its text.

    On a terminal it is a spinner, elsewhere (logs, CI) plain lines, of updates one every few seconds.
    """
    if sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415 (slow to import, and a server seldom has a terminal)
        from rich.markup import escape  # noqa: PLC0415

        # A path may hold brackets, which are no markup.
        with Console(stderr=True).status(escape(f"{text} …")) as status:
            yield lambda update: status.update(escape(f"{update} …"))
        return
    say(f"{text} …")
    printed_at = time.monotonic()

    def update(text: str) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _UPDATE_SECONDS:
            say(f"{text} …")
            printed_at = time.monotonic()

    yield update


def load_progress(name: str, loaded: Loaded) -> str:
    return f"loading {name}: {loaded.done / 1e6:,.0f} of {loaded.total / 1e6:,.0f} MB"


def download_progress(name: str, done: int, total: int) -> str:
    return f"downloading {name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"


def print_error(error: Exception) -> None:
    say(f"error: {error}")
    if isinstance(error, ServingError) and error.detail:
        say("\n".join(f"  {line}" for line in error.detail.splitlines()))


def banner(
    settings: Settings,
    gateway_url: str,
    reports: Mapping[str, Mapping[str, Any]],
    chats: Sequence[str],
    log: Path | None,
) -> str:
    """The served models and addresses, with two commands to copy; `reports` holds each LM's engine status.

    `gateway_url` is empty without a gateway; `chats` are the models that have a chat template.
    """
    triton = reachable_host(settings.triton_host)
    lines = ["", "tritonlm is serving"]
    for name, report in reports.items():
        lines.append(
            f"  {name}: {report.get('device', '?')}, {report.get('dtype', '?')}, "
            f"context {report.get('context_length', '?')}, {report.get('slots', '?')} slots, "
            f"KV cache of {report.get('kv_cache_tokens', '?')} tokens"
        )
        lines.append(
            f"    full-context slots that fit: {report.get('full_context_slots', '?')}; memory "
            f"{_size(report.get('memory_bytes'))} now, up to {_size(report.get('memory_reserved_bytes'))}"
        )
    if gateway_url:
        lines += [
            f"  API      {gateway_url}/v1",
            f"  try it   {gateway_url}/playground",
            f"  docs     {gateway_url}/docs",
        ]
    lines += [
        f"  Triton   http://{triton}:{settings.http_port}, gRPC {triton}:{settings.grpc_port}, "
        f"metrics http://{triton}:{settings.metrics_port}/metrics",
        f"  log      {log if log is not None else 'standard error'}",
        "",
        "Try it (Ctrl-C stops the server):",
    ]
    names = list(reports)
    lines += _gateway_examples(names, chats, gateway_url) if gateway_url else _triton_examples(names, settings)
    return "\n".join(lines) + "\n"


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:,.0f} MiB"


def _gateway_examples(names: Sequence[str], chats: Sequence[str], gateway_url: str) -> Iterator[str]:
    url = f"{gateway_url.removeprefix('http://')}/v1"
    text = {"model": names[0], "prompt": _prompt_for(names[0]), "max_tokens": 20, "temperature": 0}
    yield f"  curl {url}/completions -d '{json.dumps(text)}'"
    if chats:
        prompt = _STORY_PROMPT if chats[0] == _STORYTELLER else _CHAT_PROMPT
        chat = {"model": chats[0], "messages": [{"role": "user", "content": prompt}], "stream": True}
        yield f"  curl -N {url}/chat/completions -d '{json.dumps(chat)}'"
    else:
        yield f"  curl -N {url}/completions -d '{json.dumps({**text, 'stream': True})}'"


def _triton_examples(names: Sequence[str], settings: Settings) -> Iterator[str]:
    url = f"{reachable_host(settings.triton_host)}:{settings.http_port}/v2/models/{names[0]}"
    text = {"text_input": _prompt_for(names[0]), "max_tokens": 20, "temperature": 0}
    yield f"  curl -N {url}/generate_stream -d '{json.dumps({**text, 'stream': True})}'"
    yield f"  curl {url}/generate -d '{json.dumps(text)}'"


def _prompt_for(name: str) -> str:
    return "123+456=" if name == _ADDER else "Once upon a time"
