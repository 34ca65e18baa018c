"""The request bodies: their types and their documentation. The client validates the values.

The fields that other APIs have, too, are the client's (`request_fields`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, create_model

from tritonlm.client.chat_parsing.tools import HOSTED_TOOLS, MAX_TOOLS
from tritonlm.client.request_fields import NULL, Body, Integer, Model, Refused, ShortText, sampling_fields
from tritonlm.client.sequences import MAX_SEQUENCES
from tritonlm.contract.parameters import MAX_TOKENS_LIMIT
from tritonlm.contract.tool_formats import Effort

Count = Annotated[Integer | None, Field(ge=1, le=MAX_SEQUENCES)]
TokenId = Annotated[Integer, Field(ge=0, lt=2**31)]
# `fail_fast` on every list of a body: pydantic makes an error of each wrong item otherwise, a million for one body.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)
_TEXT = {"type": "string"}
# What other APIs add to a part, such as annotations or cache_control, is ignored.
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": _TEXT},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
_TOOL_CALL = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": {"type": "string", "contentMediaType": "application/json"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["function"],
}
# As with every optional field, null means "not sent".
_MESSAGE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"role": {"type": "string", "minLength": 1}, "content": _CONTENT},
            "required": ["role", "content"],
            "additionalProperties": NULL,
        },
        {
            "type": "object",
            "properties": {
                "role": {"const": "assistant"},
                "content": {"anyOf": [_CONTENT, NULL]},
                "reasoning_content": {"anyOf": [_TEXT, NULL]},
                "tool_calls": {"type": "array", "items": _TOOL_CALL, "minItems": 1},
            },
            "required": ["role", "tool_calls"],
            "additionalProperties": NULL,
        },
        {
            "type": "object",
            "properties": {
                "role": {"const": "tool"},
                "content": _CONTENT,
                "tool_call_id": {"anyOf": [_TEXT, NULL]},
                "name": {"anyOf": [_TEXT, NULL]},
            },
            "required": ["role", "content"],
            "additionalProperties": NULL,
        },
    ]
}
_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
        "description": {"anyOf": [_TEXT, NULL]},
        "parameters": {"anyOf": [{"type": "object"}, NULL]},
        "strict": {"anyOf": [{"type": "boolean"}, NULL]},
    },
    "required": ["name"],
    "additionalProperties": NULL,
}
_TOOL = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION},
            "required": ["type", "function"],
        },
        # They run on their provider's servers: left out, and named in the answer.
        {"type": "object", "properties": {"type": {"enum": sorted(HOSTED_TOOLS)}}, "required": ["type"]},
    ]
}
_NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _NAMED_TOOL,
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {"type": "array", "items": _NAMED_TOOL, "minItems": 1},
                    },
                    "required": ["mode", "tools"],
                },
            },
            "required": ["type", "allowed_tools"],
        },
        NULL,
    ]
}
# The model's chat template decides about further fields.
Message = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]
# The client reads tools and names what is wrong in them.
Tool = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]
ToolChoice = Annotated[Any, WithJsonSchema(_TOOL_CHOICE)]


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="end the stream with a chunk that holds the usage")
    include_obfuscation: Literal[False] | None = Field(None, description="no obfuscation is ever sent")


class _Common(Body):
    model: Model = Field(description="a language model or an adapter, as /v1/models lists them")
    n: Count = Field(None, description="choices for each prompt")
    stream: bool | None = Field(None, description="server-sent events as text is generated")
    stream_options: StreamOptions | None = Field(None, description="only with stream: {include_usage}")
    user: ShortText = Field(None, description="an identifier of the end user")


class _Completion(_Common):
    prompt: Prompts = Field(description="a text, several texts, the token ids of one prompt, or several lists of them")
    best_of: Count = Field(None, description="compute this many choices, return the n likeliest; not with stream")
    suffix: Refused = Field(None, description="not supported: needs a fill-in-the-middle model")


class ChatPrompt(Body):
    """The fields of a chat from which its prompt is rendered."""

    messages: list[Message] = Field(description="the chat: [{role, content}, …]", min_length=1, fail_fast=True)
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        None, description="functions that the model may call"
    )
    documents: list[dict[str, Any]] | None = Field(
        None, description="for a chat template that takes documents", fail_fast=True
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables of the chat template, such as enable_thinking"
    )
    reasoning_effort: Effort | None = Field(
        None, description="how much the model reasons, if its chat template takes it: none … max"
    )
    add_generation_prompt: bool | None = Field(None, description="whether the prompt begins the model's answer")
    continue_final_message: bool | None = Field(
        None, description="continue the last message, which is the assistant's, instead of answering it"
    )


class _Chat(_Common, ChatPrompt):
    tool_choice: ToolChoice = Field(None, description="none, auto (default), required, or the function to call")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    separate_reasoning: bool | None = Field(
        None, description="whether reasoning comes as reasoning_content (default) or stays in the content"
    )
    max_completion_tokens: Annotated[Integer | None, Field(ge=1, le=MAX_TOKENS_LIMIT)] = Field(
        None, description="the same as max_tokens"
    )
    logprobs: bool | None = Field(None, description="log-probabilities of the generated tokens")
    top_logprobs: Annotated[Integer | None, Field(ge=0, le=20)] = Field(
        None, description="with logprobs: the number of alternatives (0 … 20)"
    )


CompletionRequest: type[_Completion] = create_model("CompletionRequest", __base__=_Completion, **sampling_fields())
ChatRequest: type[_Chat] = create_model(
    "ChatRequest", __base__=_Chat, **sampling_fields("echo", "logprobs", "logprobs_start", "add_special_tokens")
)


class EmbeddingRequest(Body):
    model: Model = Field(description="the language model's name")
    input: Prompts = Field(description="a text, several texts, or their token ids")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="the encoding of the vectors")
    dimensions: Refused = Field(None, description="not supported: the vectors have a fixed size")
    user: ShortText = Field(None, description="an identifier of the end user")


class ApplyTemplateRequest(ChatPrompt):
    model: Model | None = Field(None, description="the language model; default: the gateway's default model")


class TokenizeRequest(Body):
    model: Model | None = Field(None, description="the language model; default: the gateway's default model")
    prompt: str = Field(description="the text to tokenize")
    add_special_tokens: bool | None = Field(None, description="whether to add the tokenizer's special tokens")


class DetokenizeRequest(Body):
    model: Model | None = Field(None, description="the language model; default: the gateway's default model")
    tokens: TokenIds = Field(description="the ids to convert to text")
