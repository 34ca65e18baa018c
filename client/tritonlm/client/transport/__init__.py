"""The transport interface between client and Triton, and the types that cross it.

`grpc_transport` implements it with tritonclient; tests use a fake. A transport knows one Triton, and neither retries
nor OpenAI's objects.
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
    """Exactly one of: a text, token ids, or a chat as JSON."""

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
    # W3C traceparent; empty if it belongs to no trace.
    traceparent: str = field(default_factory=tracing.current.get)


@dataclass(frozen=True)
class PromptEmbedding:
    """A prompt as a unit vector, and the number of its tokens."""

    vector: list[float]
    tokens: int


@dataclass(frozen=True)
class RepositoryModel:
    """A language model in Triton's repository."""

    name: str
    ready: bool
    reason: str = ""
    loading: bool = False


class Transport(Protocol):
    """One Triton. Methods raise only errors of `tritonlm.contract.errors`."""

    url: str

    def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The sequence's pieces; the last has a finish reason. Closing the generator earlier cancels the request."""
        ...

    async def embed(self, call: Call) -> PromptEmbedding: ...

    async def command(self, model: str, command: Command) -> dict[str, Any]: ...

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]: ...

    async def render(self, model: str, prompt: Prompt) -> str:
        """A chat as text, as the checkpoint's template renders it."""
        ...

    async def detokenize(self, model: str, ids: Sequence[int]) -> str: ...

    async def ping(self, model: str) -> dict[str, Any]:
        """Ping each of the LM's processes and return the engine's status; raises if one does not answer."""
        ...

    async def models(self) -> list[RepositoryModel]: ...

    async def load(self, model: str, timeout: float) -> None: ...

    async def unload(self, model: str) -> None: ...

    async def is_live(self) -> bool: ...

    async def close(self) -> None: ...
