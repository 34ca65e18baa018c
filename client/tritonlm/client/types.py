"""The client's results: OpenAI's objects as typed models.

This module defines fields only. `results` and `embeddings` fill them, and the gateway serializes them unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class Result(BaseModel):
    model_config = ConfigDict(frozen=True)

    def to_json(self) -> str:
        return self.model_dump_json()

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.to_json())
        return fields


class CompactResult(Result):
    """Its JSON has only the fields that were set, as OpenAI's does: others are left out instead of null."""

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class CachedTokens(Result):
    cached_tokens: int = 0


class CompletionUsage(Result):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens = CachedTokens()


# The stop string that ended the text (vLLM's name); null at another end.
StopReason = Annotated[str | None, Field(description="the stop string that ended the text, if one did")]


class CompletionLogprobs(Result):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Result):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = Field(None, description="the generated ids, with return_token_ids")
    seed: int | None = Field(None, description="the seed in use, from the request or random")


class Completion(CompactResult):
    """A complete completion, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class TopLogprob(Result):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(Result):
    content: list[ChatTokenLogprob]


class CalledFunction(Result):
    name: str
    # JSON, as the model wrote it.
    arguments: str


class ToolCall(Result):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Result):
    role: Literal["assistant"] = "assistant"
    # Null when the model only calls tools.
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(None, description="what the model thought before its answer")
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Result):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None
    seed: int | None = None


class ChatCompletion(CompactResult):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    warnings: list[str] | None = Field(None, description="what of the request was left out")


class FunctionDelta(Result):
    name: str | None = None
    arguments: str = ""


class ToolCallDelta(Result):
    """A part of a call: the first one has its id and its function's name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Result):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Result):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None
    seed: int | None = None


class ChatCompletionChunk(CompactResult):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    warnings: list[str] | None = Field(None, description="what of the request was left out; in the first chunk")


class EmbeddingItem(Result):
    object: Literal["embedding"] = "embedding"
    index: int
    # Numbers, or base64 of little-endian 32-bit floats.
    embedding: list[float] | str


class EmbeddingUsage(Result):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Result):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class Model(Result):
    """A language model and, if it is ready, its engine's status. `places` is the old name of `slots`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tritonlm"
    state: Literal["ready", "loading", "unavailable"]
    reason: str | None = None
    max_model_len: int | None = None
    device: str | None = None
    dtype: str | None = None
    # How many sequences run together.
    slots: int | None = None
    places: int | None = Field(default=None, description="deprecated: the same as slots")
    running: int | None = None
    waiting: int | None = None
    # Weights, KV cache and the engine's process: their current size, and the size with the KV cache in full use.
    memory_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    # The limit for all models on its device together (0: no limit), and this model's claim on it so far.
    memory_budget: int | None = None
    memory_claimed_bytes: int | None = None
    # How many sequences of full context length fit into its KV cache at once.
    full_context_slots: int | None = None
    idle_seconds: float | None = None
    # The gateway unloads it after this time without a request; 0: never.
    idle_unload_seconds: float | None = None
    # The checkpoint's training record.
    training: dict[str, Any] | None = None
    # Of an adapter, as vLLM names them.
    parent: str | None = Field(default=None, description="of an adapter: its language model")
    root: str | None = Field(default=None, description="of an adapter: its folder, or its id on the Hub")


class ModelList(Result):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Result):
    """`live`: a Triton answers. `ready`: a language model is loaded, and each loaded one answers on some Triton.

    `silent` lists the loaded models that do not answer: their processes have died, hang, or are stopping.
    """

    live: bool
    ready: bool
    models: list[str]
    silent: list[str] = []


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability and its best alternatives, with their texts."""

    token_id: int
    token: str
    logprob: float | None
    bytes: list[int] | None
    # The token's offset, in characters from the beginning of this piece's text.
    offset: int
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True)
class Piece:
    """One response of one sequence: new text, and the token counts so far."""

    index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seed: int
    token_ids: list[int]
    logprobs: list[Logprob] | None
    # The stop string that ended the text, if one did.
    stop: str = ""
