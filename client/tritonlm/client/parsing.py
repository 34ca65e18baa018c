"""Answers as objects of a pydantic model: its schema for the request, and its instances from the answers.

The text follows the schema by construction. What the class's own validators refuse is pydantic's ValidationError.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, SerializeAsAny

from tritonlm.client.types import ChatChoice, ChatCompletion, ChatMessage
from tritonlm.contract import InvalidRequest

M = TypeVar("M", bound=BaseModel)
_NAME = "response_format"


class ParsedChatMessage(ChatMessage, Generic[M]):
    # None when the answer is calls of tools.
    parsed: SerializeAsAny[M] | None = None


class ParsedChatChoice(ChatChoice, Generic[M]):
    message: ParsedChatMessage[M]


class ParsedChatCompletion(ChatCompletion, Generic[M]):
    choices: list[ParsedChatChoice[M]]  # type: ignore[assignment]


class AnswerCutOff(InvalidRequest):
    """An answer ended at the limit of tokens, before its JSON was complete."""

    def __init__(self, completion: ChatCompletion) -> None:
        tokens = completion.usage.completion_tokens
        super().__init__(
            f"the answer ended by length after {tokens} tokens, before its JSON was complete; raise max_tokens",
            "max_tokens",
        )
        self.completion = completion


def response_format_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The request's `response_format` for a pydantic model."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        raise InvalidRequest(f"{_NAME} must be a pydantic model's class; for a JSON schema use create", _NAME)
    schema = kind.model_json_schema()
    _close(schema)
    return {"type": "json_schema", "json_schema": {"name": kind.__name__, "schema": schema, "strict": True}}


def parse_answers(completion: ChatCompletion, kind: type[M]) -> ParsedChatCompletion[M]:
    if any(choice.finish_reason == "length" for choice in completion.choices):
        raise AnswerCutOff(completion)
    choices = [_parsed_choice(choice, kind) for choice in completion.choices]
    return ParsedChatCompletion.model_construct(
        _fields_set=completion.model_fields_set, **_with(completion, choices=choices)
    )


def _parsed_choice(choice: ChatChoice, kind: type[M]) -> ParsedChatChoice[M]:
    message = choice.message
    # Calls of tools take the place of the answer.
    parsed = kind.model_validate_json(message.content) if message.content and not message.tool_calls else None
    parsed_message: ParsedChatMessage[M] = ParsedChatMessage.model_construct(
        _fields_set={*message.model_fields_set, "parsed"}, **_with(message, parsed=parsed)
    )
    return ParsedChatChoice.model_construct(
        _fields_set=choice.model_fields_set, **_with(choice, message=parsed_message)
    )


def _with(result: BaseModel, **values: Any) -> dict[str, Any]:
    return {**dict(result), **values}


def _close(schema: Any) -> None:
    """Allow no further fields in objects where the class does not say so itself: an answer would invent some."""
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    for name in ("$defs", "properties"):
        for part in schema.get(name, {}).values():
            _close(part)
    for name in ("anyOf", "oneOf", "prefixItems"):
        for part in schema.get(name, []):
            _close(part)
    for name in ("items", "additionalProperties"):
        _close(schema.get(name))
