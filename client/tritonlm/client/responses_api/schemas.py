"""The fields of a request: of POST /v1/responses, and of `client.responses.create`.

Fields without an effect on a local model are accepted where they cannot change the answer; the others are refused.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model

from tritonlm.client.chat_tools import MAX_TOOLS
from tritonlm.client.request_fields import Body, Integer, Model, Refused, ShortText, sampling_fields
from tritonlm.contract.parameters import MAX_TOKENS_LIMIT
from tritonlm.contract.tool_formats import Effort

MAX_ITEMS = 10_000
# Validated by `items` and `tools`, whose errors name the place.
Items = Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS, fail_fast=True)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)]
Choice = str | dict[str, Any]
Flag = Annotated[Literal[False] | None, WithJsonSchema({"enum": [False, None]})]
LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip
_MAX_METADATA = 16


def _bounded(metadata: object) -> object:
    """One entry more than allowed at most: pydantic makes an error of each wrong entry before it counts them."""
    return dict(islice(metadata.items(), _MAX_METADATA + 1)) if isinstance(metadata, dict) else metadata


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=_MAX_METADATA),
    BeforeValidator(_bounded),
]


class TextConfig(Body):
    format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with name and schema")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="has no effect; named in warnings")


class ReasoningConfig(Body):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: ShortText = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="no obfuscation is ever sent")


class CacheOptions(Body):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None


class _Base(Body):
    model: Model = Field(description="the language model's name, as /v1/models lists it")
    input: str | Items = Field(description="a text, or items: messages, function calls and their outputs, reasoning")
    instructions: str | None = Field(None, description="the system message, before the input")
    max_output_tokens: Annotated[Integer | None, Field(ge=1, le=MAX_TOKENS_LIMIT)] = Field(
        None, description="maximum tokens to generate; not sent: what fits into the context"
    )
    top_logprobs: Annotated[Integer | None, Field(ge=0, le=20)] = Field(
        None, description="alternatives of each token; needs message.output_text.logprobs in include"
    )
    stream: bool | None = Field(None, description="server-sent events as text is generated")
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = Field(None, description="the format of the text")
    tools: Tools | None = Field(
        None, description="function and custom tools; hosted ones are left out and named in warnings"
    )
    tool_choice: Choice | None = Field(None, description="none, auto, required, or {type: function, name}")
    parallel_tool_calls: bool | None = Field(None, description="whether one answer may call several tools")
    reasoning: ReasoningConfig | None = Field(
        None, description="effort: how much the model reasons, if its chat template takes it"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables of the chat template, such as enable_thinking"
    )
    include: list[Includable] | None = Field(
        None, description="message.output_text.logprobs has an effect", fail_fast=True
    )
    metadata: Metadata | None = Field(None, description="returned with the response")
    store: bool | None = Field(None, description="keep the response for previous_response_id; needs --response-store")
    previous_response_id: ShortText = Field(None, description="a stored response that this one continues")
    service_tier: Literal["auto", "default", "flex", "priority", "fast"] | None = Field(
        None, description="flex is priority 3, priority and fast are priority 1"
    )
    # Without an effect: prefixes are cached by their content, and there are no calls of built-in tools to count.
    prompt_cache_key: ShortText = Field(None, description="no effect: prefixes are cached by their content")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(None, description="no effect")
    prompt_cache_options: CacheOptions | None = Field(None, description="no effect")
    max_tool_calls: Annotated[Integer | None, Field(ge=1)] = Field(None, description="counts hosted tools: no effect")
    user: ShortText = Field(None, description="an identifier of the end user")
    safety_identifier: ShortText = Field(None, description="an identifier of the end user")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest items until the prompt fits into the context"
    )
    background: Flag = Field(None, description="true is not supported")
    conversation: Refused = Field(None, description="not supported: use previous_response_id")
    prompt: Refused = Field(None, description="not supported: this server has no prompt templates")
    moderation: Refused = Field(None, description="not supported")
    context_management: Refused = Field(None, description="not supported")


# `response_format` is `text.format` here.
_WITHOUT = (
    "echo",
    "logprobs",
    "logprobs_start",
    "add_special_tokens",
    "max_tokens",
    "response_format",
    "return_token_ids",
)
ResponseRequest: type[_Base] = create_model("ResponseRequest", __base__=_Base, **sampling_fields(*_WITHOUT))
SAMPLING = tuple(sampling_fields(*_WITHOUT))


class InputTokensRequest(Body):
    model: Model = Field(description="the language model's name")
    input: str | Items = Field(description="as in POST /v1/responses")
    instructions: str | None = None
    previous_response_id: ShortText = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest items until the prompt fits into the context"
    )
    conversation: Refused = Field(None, description="not supported: use previous_response_id")
