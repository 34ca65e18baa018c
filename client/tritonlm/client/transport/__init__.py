"""How the client reaches a Triton: the interface, which tests may fill otherwise, and the call that goes through it.

`grpc_transport` is the real one, and the only room that knows tritonclient.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tritonlm.client.types import Piece
from tritonlm.contract.control import Command
from tritonlm.observability import tracing


@dataclass(frozen=True)
class Prompt:
    """A text, or token ids, or a chat as JSON: exactly one of them."""

    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    messages: str | None = None


@dataclass(frozen=True)
class Call:
    """One sequence to generate."""

    model: str
    request_id: str
    prompt: Prompt
    parameters: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    timeout: float = 600.0
    # Of the trace that it belongs to; empty: of none.
    traceparent: str = field(default_factory=tracing.current.get)


@dataclass(frozen=True)
class Embedded:
    """A prompt as a vector of length one, and how many tokens it had."""

    vector: list[float]
    tokens: int


@dataclass(frozen=True)
class Listed:
    """A language model in Triton's repository."""

    name: str
    ready: bool
    reason: str = ""
    loading: bool = False


class Transport(Protocol):
    """One Triton. Every method raises errors of `tritonlm.contract.errors` alone."""

    url: str

    def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The sequence's pieces, the last with a finish reason. Closed earlier, it cancels the request."""
        ...

    async def embed(self, call: Call) -> Embedded: ...

    async def command(self, model: str, command: Command) -> dict[str, Any]: ...

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]: ...

    async def detokenize(self, model: str, ids: Sequence[int]) -> str: ...

    async def ping(self, model: str) -> dict[str, Any]:
        """A sign of life of each of the LM's processes, and what its engine tells; an error where there is none."""
        ...

    async def models(self) -> list[Listed]: ...

    async def load(self, model: str, timeout: float) -> None: ...

    async def unload(self, model: str) -> None: ...

    async def is_live(self) -> bool: ...

    async def close(self) -> None: ...
