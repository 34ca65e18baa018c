"""The objects of the Responses API: a response with its items, and the events of a stream.

This module defines fields only; `writer` fills them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tritonlm.client.types import CompactResult, Result

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Result):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[dict[str, Any]]


class OutputMessage(Result):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class ReasoningText(Result):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Result):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[dict[str, Any]]
    content: list[ReasoningText]
    encrypted_content: None


class FunctionCall(Result):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    # JSON, as the model wrote it.
    arguments: str
    status: Status


class CustomToolCall(Result):
    type: Literal["custom_tool_call"]
    id: str
    call_id: str
    name: str
    input: str
    status: Status


OutputItem = Annotated[OutputMessage | ReasoningItem | FunctionCall | CustomToolCall, Field(discriminator="type")]


class InputTokenDetails(Result):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokenDetails(Result):
    reasoning_tokens: int


class ResponseUsage(Result):
    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class ResponseObject(CompactResult):
    """A response: its output items and usage, and the fields of its request."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: ResponseUsage | None
    warnings: list[str] = Field(description="fields and tools of the request that have no effect here")

    @property
    def output_text(self) -> str:
        """The text of all messages."""
        return "".join(part.text for item in self.output if isinstance(item, OutputMessage) for part in item.content)


class ResponseEvent(CompactResult):
    """An event of a stream; its further fields depend on its type (`delta`, `item`, `output_index` …)."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    # In the events about the whole response.
    response: ResponseObject | None = None


class InputTokens(Result):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class DeletedResponse(Result):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(Result):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
