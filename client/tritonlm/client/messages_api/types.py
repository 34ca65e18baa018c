"""The objects of Anthropic's Messages API: a message with its content blocks, and the events of a stream.

This module defines fields only; `writer` fills them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tritonlm.client.types import CompactResult, Result


class TextBlock(Result):
    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlock(Result):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Result):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessageUsage(Result):
    """The prompt's tokens are the sum of the three fields about input."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(CompactResult):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    warnings: list[str] = Field(description="fields and tools of the request that have no effect here")


class MessageEvent(CompactResult):
    """An event of a stream; its further fields depend on its type (`delta`, `index`, `content_block` …)."""

    model_config = ConfigDict(extra="allow")

    type: str
    # In `message_start`.
    message: MessageObject | None = None


class TokenCount(Result):
    input_tokens: int
