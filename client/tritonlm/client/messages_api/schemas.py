"""The fields of a request: of POST /v1/messages, and of `client.messages.create`.

Fields without an effect on a local model are accepted where they cannot change the answer; the others are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from tritonlm.client.chat_tools import MAX_TOOLS
from tritonlm.client.request_fields import Body, Integer, Model, Refused, ShortText, sampling_fields
from tritonlm.contract.parameters import MAX_TOKENS_LIMIT
from tritonlm.contract.readers import MAX_STOP_CHARACTERS, MAX_STOPS

from .documented import Message, System, Thinking, ToolChoice

_MAX_MESSAGES = 100_000
# Validated by `blocks` and `request`, whose errors name the place.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Tools = Annotated[Objects, Field(max_length=MAX_TOOLS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class MessageMetadata(Body):
    user_id: ShortText = None


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="how much the model reasons, if its chat template takes it"
    )
    format: dict[str, Any] | None = Field(None, description="{type: json_schema, schema}")


class _Prompt(Body):
    model: Model = Field(description="the language model's name, as /v1/models lists it")
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)] = Field(
        description="the chat: [{role, content}, …] with text, tool_use, tool_result and thinking blocks"
    )
    system: System | None = Field(None, description="the system message, or text blocks")
    tools: Tools | None = Field(None, description="custom tools; hosted ones are left out and named in warnings")
    tool_choice: ToolChoice | None = Field(None, description="{type: auto | any | tool | none}")
    thinking: Thinking | None = Field(None, description="{type: enabled | adaptive | disabled}")
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables of the chat template, such as enable_thinking"
    )
    cache_control: CacheControl | None = Field(None, description="no effect: prefixes are cached by their content")
    context_management: dict[str, Any] | None = Field(None, description="has no effect; named in warnings")
    mcp_servers: Objects | None = Field(None, description="left out and named in warnings")


class _Message(_Prompt):
    max_tokens: Annotated[Integer, Field(ge=1, le=MAX_TOKENS_LIMIT)] = Field(description="maximum tokens to generate")
    stop_sequences: Annotated[list[Stop] | None, Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        None, description="strings that end the text; they are not part of it"
    )
    stream: bool | None = Field(None, description="server-sent events as text is generated")
    metadata: MessageMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="no effect")
    speed: Literal["standard", "fast"] | None = Field(None, description="fast is priority 1")
    inference_geo: Refused = Field(None, description="not supported: this server does not know its place")
    container: Refused = Field(None, description="not supported")
    diagnostics: Refused = Field(None, description="not supported")


# `stop` is `stop_sequences` here, and `response_format` is `output_config.format`.
_WITHOUT = (
    "echo", "logprobs", "logprobs_start", "add_special_tokens", "max_tokens", "stop", "response_format",
    "return_token_ids",
)  # fmt: skip
MessageRequest: type[_Message] = create_model("MessageRequest", __base__=_Message, **sampling_fields(*_WITHOUT))
SAMPLING = tuple(sampling_fields(*_WITHOUT))


class CountRequest(_Prompt):
    speed: Literal["standard", "fast"] | None = Field(None, description="no effect")
