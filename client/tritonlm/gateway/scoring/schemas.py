"""The bodies of /v1/score, /v1/rerank and /v1/decisions, and their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from tritonlm.client.request_fields import NULL, Body, Integer, Model, ShortText
from tritonlm.client.responses_api.schemas import CacheOptions

from .decisions import MAX_CHOICES, MAX_LEVELS

MAX_TEXTS = 1000
Texts = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
)
Priority = Annotated[Integer | None, Field(ge=1, le=3, description="1 is served first, 3 last")]


class ScoreRequest(Body):
    model: Model = Field(description="the language model's name, as /v1/models lists it")
    text_1: Texts = Field(description="the text before, or one for each text_2")
    text_2: Texts = Field(description="the text whose likelihood is the score, or several")
    user: ShortText = Field(None, description="an identifier of the end user")
    priority: Priority = None


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float = Field(description="the mean probability of a token of text_2: exp of the mean log-probability")
    log_likelihood: float = Field(description="the sum of the log-probabilities of text_2")
    tokens: int = Field(description="the number of tokens of text_2")


class ScoreUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Scores(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: ScoreUsage


class RerankDocument(Body):
    text: str = Field(min_length=1)


Documents = list[Annotated[str, Field(min_length=1)] | RerankDocument]


class RerankRequest(Body):
    model: Model = Field(description="the language model's name")
    query: str = Field(min_length=1, description="what the documents are ranked for")
    documents: Annotated[Documents, Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)] = Field(
        description="texts, or objects with text"
    )
    top_n: Annotated[Integer | None, Field(ge=1)] = Field(None, description="return the best n only")
    return_documents: bool | None = Field(None, description="whether the documents are returned (default), too")
    user: ShortText = Field(None, description="an identifier of the end user")
    priority: Priority = None


class RankedDocument(BaseModel):
    index: int
    relevance_score: float
    document: RerankDocument | None


class Ranking(BaseModel):
    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument]
    usage: ScoreUsage


_TEXT = {"type": "string"}
_INSTRUCTIONS = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"type": {"const": "input_text"}, "text": _TEXT},
                        "required": ["type", "text"],
                    },
                    {
                        "type": "object",
                        "properties": {"type": {"const": "input_json"}, "data": {"type": ["object", "array"]}},
                        "required": ["type", "data"],
                    },
                ]
            },
            "minItems": 1,
        },
    ]
}


def _question(kind: str, **options: Any) -> dict[str, Any]:
    named = {"type": {"const": kind}, "name": {"anyOf": [_TEXT, NULL]}, "instructions": _INSTRUCTIONS}
    return {
        "type": "object",
        "properties": {**named, **options},
        "required": ["type", "instructions", *options],
        "additionalProperties": NULL,
    }


def _options(field: str, value: dict[str, Any], most: int) -> dict[str, Any]:
    option = {
        "type": "object",
        "properties": {field: value, "description": {"anyOf": [_TEXT, NULL]}},
        "required": [field],
        "additionalProperties": NULL,
    }
    return {"type": "array", "items": option, "minItems": 2, "maxItems": most}


# `decisions` checks them, and its errors name the place.
Question = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                _question("predicate"),
                _question("choice", choices=_options("value", {"type": ["string", "boolean"]}, MAX_CHOICES)),
                _question("score", levels=_options("label", _TEXT, MAX_LEVELS)),
            ]
        }
    ),
]


class DecisionRequest(Body):
    model: Model = Field(description="the language model's name")
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000, fail_fast=True)] = Field(
        description="a text, or messages and calls of tools, which every question is about"
    )
    questions: Annotated[list[Question], Field(min_length=1, max_length=400, fail_fast=True)] = Field(
        description="predicates, choices and scores, each with instructions"
    )
    prompt_cache_key: ShortText = Field(None, description="no effect: prefixes are cached by their content")
    prompt_cache_options: CacheOptions | None = Field(None, description="no effect")
    safety_identifier: ShortText = Field(None, description="an identifier of the end user")
    priority: Priority = None


class _Details(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class _OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """Every option counts with the whole input before it. What is computed once for several is in `cached_tokens`."""

    input_tokens: int
    input_tokens_details: _Details
    output_tokens: int = 0
    output_tokens_details: _OutputDetails = _OutputDetails()
    total_tokens: int


class DecisionAnswers(BaseModel):
    model: str
    answers: list[dict[str, Any]] = Field(description="an answer for each question, in their order")
    usage: DecisionUsage
