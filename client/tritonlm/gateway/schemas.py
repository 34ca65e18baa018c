"""The bodies of requests, for their documentation and their types; what values are possible the client decides.

The sampling parameters' fields are made from the contract, so that no name is written twice.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from tritonlm.contract import SamplingParameters

# Not for callers of the gateway: the client settles them.
_OURS = ("choice", "resume_token_ids", "timeout")
_TYPES: dict[str, Any] = {
    "int": int, "int | None": int, "float": float, "float | None": float, "bool": bool,
    "tuple[str, ...]": str | list[str], "tuple[int, ...]": list[int], "dict[int, float]": dict[str, float],
}  # fmt: skip


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def arguments(self) -> dict[str, Any]:
        """What was sent. `null` is as if it had not been."""
        return {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}


def _sampling_fields(*without: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in fields(SamplingParameters):
        if spec.name not in (*_OURS, *without):
            meaning = f"{spec.metadata['meaning']} ({spec.metadata['allowed']})"
            found[spec.name] = (_TYPES[str(spec.type)] | None, Field(None, description=meaning))
    return found


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="end the stream with a chunk that holds the usage")


class _Common(Body):
    model: str = Field(description="the language model's name, as /v1/models lists it")
    n: int | None = Field(None, description="answers to each prompt")
    stream: bool | None = Field(None, description="server-sent events as text comes")
    stream_options: dict[str, Any] | None = Field(None, description="only with stream: {include_usage}")
    user: str | None = Field(None, description="an identifier of the end user")


class _Completion(_Common):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, several texts, the token ids of one prompt, or several lists of them"
    )
    best_of: int | None = Field(None, description="compute so many answers, give the n likeliest; not with stream")
    suffix: str | None = Field(None, description="refused: needs a model that fills in the middle")


class _Chat(_Common):
    messages: list[dict[str, Any]] = Field(description="the chat: [{role, content}, …]", min_length=1)
    max_completion_tokens: int | None = Field(None, description="the same as max_tokens")
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, description="with logprobs: so many alternatives (0 … 20)")


CompletionRequest: type[_Completion] = create_model("CompletionRequest", __base__=_Completion, **_sampling_fields())
ChatRequest: type[_Chat] = create_model(
    "ChatRequest", __base__=_Chat, **_sampling_fields("echo", "logprobs", "add_special_tokens")
)


class EmbeddingRequest(Body):
    model: str = Field(description="the language model's name")
    input: str | list[str] | list[int] | list[list[int]] = Field(description="a text, several, or their token ids")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="how the vectors are written")
    dimensions: int | None = Field(None, description="refused: the vectors have one size")
    user: str | None = Field(None, description="an identifier of the end user")


class TokenizeRequest(Body):
    model: str | None = Field(None, description="the language model; the default one, if it is not named")
    prompt: str = Field(description="the text to turn into token ids")
    add_special_tokens: bool | None = Field(None, description="whether the tokens that begin a text are added")


class DetokenizeRequest(Body):
    model: str | None = Field(None, description="the language model; the default one, if it is not named")
    tokens: list[int] = Field(description="the ids to turn into text", min_length=1)
