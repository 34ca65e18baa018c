"""The bodies of requests, for their documentation and their types; what values are possible the client decides.

The sampling parameters' fields are made from the contract, so that no name is written twice.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from tritonlm.client.sequences import CLIENTS_OWN, MAX_SEQUENCES
from tritonlm.contract import SamplingParameters
from tritonlm.contract.parameters import MAX_TOKENS_LIMIT

_NULL = {"type": "null"}


def _whole(value: object) -> object:
    """To JSON 5.0 is an integer, and there are languages whose numbers are all written so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Integer | None, Field(ge=1, le=MAX_SEQUENCES)]
ShortText = Annotated[str | None, Field(max_length=256)]
Model = Annotated[str, Field(min_length=1)]
TokenId = Annotated[Integer, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
# Refused by the client, in its own words.
Refused = Annotated[Any, WithJsonSchema(_NULL)]
_TEXT = {"type": "string"}
_TEXT_PART = {
    "type": "object", "properties": {"type": {"const": "text"}, "text": _TEXT}, "required": ["type", "text"],
    "additionalProperties": False,
}  # fmt: skip
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_PART, "minItems": 1}]},
    },
    "required": ["role", "content"],
    # As with every optional field, null is as if it had not been sent.
    "additionalProperties": _NULL,
}
# What a template makes of a message is the model's matter.
Message = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def arguments(self) -> dict[str, Any]:
        """What was sent. `null` is as if it had not been."""
        sent = self.model_dump(include=self.model_fields_set)
        return {name: value for name, value in sent.items() if value is not None}


def _sampling_fields(*without: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in fields(SamplingParameters):
        if spec.name not in (*CLIENTS_OWN, *without):
            meaning = f"{spec.metadata['meaning']} ({spec.metadata['allowed']})"
            # Shown here and checked by the contract, so that there is one authority and one wording.
            shown: dict[str, Any] = {"anyOf": [spec.metadata["reader"].schema, _NULL]}
            found[spec.name] = (Any, Field(None, description=meaning, json_schema_extra=shown))
    return found


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="end the stream with a chunk that holds the usage")


class _Common(Body):
    model: Model = Field(description="the language model's name, as /v1/models lists it")
    n: Count = Field(None, description="answers to each prompt")
    stream: bool | None = Field(None, description="server-sent events as text comes")
    stream_options: StreamOptions | None = Field(None, description="only with stream: {include_usage}")
    user: ShortText = Field(None, description="an identifier of the end user")


class _Completion(_Common):
    prompt: Prompts = Field(description="a text, several texts, the token ids of one prompt, or several lists of them")
    best_of: Count = Field(None, description="compute so many answers, give the n likeliest; not with stream")
    suffix: Refused = Field(None, description="refused: needs a model that fills in the middle")


class _Chat(_Common):
    messages: list[Message] = Field(description="the chat: [{role, content}, …]", min_length=1)
    max_completion_tokens: Annotated[Integer | None, Field(ge=1, le=MAX_TOKENS_LIMIT)] = Field(
        None, description="the same as max_tokens"
    )
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: Annotated[Integer | None, Field(ge=0, le=20)] = Field(
        None, description="with logprobs: so many alternatives (0 … 20)"
    )


CompletionRequest: type[_Completion] = create_model("CompletionRequest", __base__=_Completion, **_sampling_fields())
ChatRequest: type[_Chat] = create_model(
    "ChatRequest", __base__=_Chat, **_sampling_fields("echo", "logprobs", "add_special_tokens")
)


class EmbeddingRequest(Body):
    model: Model = Field(description="the language model's name")
    input: Prompts = Field(description="a text, several, or their token ids")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="how the vectors are written")
    dimensions: Refused = Field(None, description="refused: the vectors have one size")
    user: ShortText = Field(None, description="an identifier of the end user")


class TokenizeRequest(Body):
    model: Model | None = Field(None, description="the language model; the default one, if it is not named")
    prompt: str = Field(description="the text to turn into token ids")
    add_special_tokens: bool | None = Field(None, description="whether the tokens that begin a text are added")


class DetokenizeRequest(Body):
    model: Model | None = Field(None, description="the language model; the default one, if it is not named")
    tokens: TokenIds = Field(description="the ids to turn into text")
