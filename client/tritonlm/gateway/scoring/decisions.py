"""Typed questions about an input, answered by the likelihoods of their options. No text is generated.

An option is written as JSON ("red", true), so that none is the beginning of another. With l(o) the sum of the
log-probabilities of the option's tokens after the prompt, its probability is exp(l(o)) / Σ exp(l(o')) over the options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlm.client.responses_api.items import as_items, read_conversation
from tritonlm.contract import InvalidRequest

MAX_CHOICES, MAX_LEVELS = 255, 10
# Each option is a sequence of its own.
MAX_OPTIONS = 2000
_MAX_JSON_CHARACTERS = 256 * 1024
# The fields of all questions, and the one that holds the options of each type.
_COMMON, _OPTIONS = ("type", "name", "instructions"), {"predicate": (), "choice": ("choices",), "score": ("levels",)}


@dataclass(frozen=True)
class Question:
    kind: str
    name: str | None
    text: str
    # Values of a choice, labels of a score's levels, or true and false.
    options: tuple[str | bool, ...]

    @property
    def continuations(self) -> list[str]:
        return [json.dumps(option, ensure_ascii=False) for option in self.options]

    def answer(self, likelihoods: Sequence[float]) -> dict[str, Any]:
        """`likelihoods`: the sum of the log-probabilities of each option."""
        probabilities = normalized(likelihoods)
        named = {"type": self.kind, "name": self.name}
        if self.kind == "predicate":
            return {**named, "probability": probabilities[0]}
        pairs = list(zip(self.options, probabilities, strict=True))
        if self.kind == "choice":
            best, confidence = max(pairs, key=lambda pair: pair[1])
            values = [{"value": value, "probability": probability} for value, probability in pairs]
            return {**named, "choice": best, "confidence": confidence, "probabilities": values}
        return {
            **named,
            "score": math.fsum(level * probability for level, probability in enumerate(probabilities)),
            "confidence": max(probabilities),
            "probabilities": [
                {"label": label, "value": level, "probability": probability}
                for level, (label, probability) in enumerate(pairs)
            ],
        }


def normalized(likelihoods: Sequence[float]) -> list[float]:
    highest = max(likelihoods)
    weights = [math.exp(likelihood - highest) for likelihood in likelihoods]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def read_questions(values: Sequence[Mapping[str, Any]]) -> list[Question]:
    questions = [_read(value, f"questions[{index}]") for index, value in enumerate(values)]
    if (count := sum(len(question.options) for question in questions)) > MAX_OPTIONS:
        raise InvalidRequest(f"questions must have at most {MAX_OPTIONS} options together (got {count})", "questions")
    return questions


def _read(value: Mapping[str, Any], where: str) -> Question:
    kind, name = value.get("type"), value.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"{where}.name must be a string", f"{where}.name")
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise InvalidRequest(f"{where}.type must be predicate, choice or score", f"{where}.type")
    _refuse_unknown(value, (*_COMMON, *_OPTIONS[kind]), where)
    instructions = _text(value.get("instructions"), f"{where}.instructions")
    if kind == "predicate":
        text = f"{instructions}\n\nIs this true? Answer true or false."
        return Question(kind, name, text, (True, False))
    if kind == "choice":
        options = _options(value.get("choices"), f"{where}.choices", "value", (str, bool), MAX_CHOICES)
    else:
        options = _options(value.get("levels"), f"{where}.levels", "label", (str,), MAX_LEVELS)
    lines = [
        f"- {json.dumps(option, ensure_ascii=False)}{f': {description}' if description else ''}"
        for option, description in options
    ]
    text = "\n".join([instructions, "", "Answer with one of these, as it is written here:", *lines])
    return Question(kind, name, text, tuple(option for option, _ in options))


def _refuse_unknown(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """As with every optional field, null means "not sent"."""
    for name, field in value.items():
        if name not in known and field is not None:
            raise InvalidRequest(f"{where}: unknown field {name[:60]!r}", f"{where}.{name[:60]}")


def _options(
    values: Any, where: str, field: str, kinds: tuple[type, ...], most: int
) -> list[tuple[str | bool, str | None]]:
    if not isinstance(values, list) or not 2 <= len(values) <= most:
        raise InvalidRequest(f"{where} must be a list of 2 to {most} objects with {field}", where)
    options: list[tuple[str | bool, str | None]] = []
    for index, value in enumerate(values):
        option: Any = value.get(field) if isinstance(value, Mapping) else None
        if not isinstance(option, (str, bool)) or not isinstance(option, kinds):
            raise InvalidRequest(f"{where}[{index}].{field} has the wrong type", f"{where}[{index}].{field}")
        _refuse_unknown(value, (field, "description"), f"{where}[{index}]")
        description = value.get("description")
        if description is not None and not isinstance(description, str):
            raise InvalidRequest(f"{where}[{index}].description must be a string", f"{where}[{index}].description")
        options.append((option, description))
    # The string "true" and the boolean are different options.
    if len({json.dumps(option) for option, _ in options}) < len(options):
        raise InvalidRequest(f"{where} must not hold the same {field} twice", where)
    return options


def messages_of(value: str | Sequence[Mapping[str, Any]], question: Question) -> list[dict[str, Any]]:
    """The chat that asks a question about the input."""
    items = [_plain(item, f"input[{index}]") for index, item in enumerate(as_items(value))]  # type: ignore[arg-type]
    messages = read_conversation(None, items).messages
    if messages[-1]["role"] == "user":
        messages[-1]["content"] += f"\n\n{question.text}"
    else:
        messages.append({"role": "user", "content": question.text})
    return messages


def plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt for a checkpoint without a chat template."""
    return "\n\n".join(str(message["content"]) for message in messages) + "\n\nAnswer: "


def _plain(item: Any, where: str) -> Any:
    """The item with its JSON parts as text parts."""
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), list):
        return item
    return {**item, "content": [_plain_part(part, f"{where}.content[{i}]") for i, part in enumerate(item["content"])]}


def _plain_part(part: Any, where: str) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "input_json":
        return part
    if not isinstance(part.get("data"), (Mapping, list)):
        raise InvalidRequest(f"{where}.data must be an object or a list of objects", f"{where}.data")
    text = json.dumps(part["data"], ensure_ascii=False)
    if len(text) > _MAX_JSON_CHARACTERS:
        raise InvalidRequest(f"{where}.data must have at most {_MAX_JSON_CHARACTERS} characters", f"{where}.data")
    return {"type": "input_text", "text": text}


def _text(value: Any, where: str) -> str:
    """The instructions: a string, or text and JSON parts."""
    parts = [{"type": "input_text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{where} must be a string or a list of parts", where)
    texts = []
    for index, part in enumerate(parts):
        plain = _plain_part(part, f"{where}[{index}]")
        text = plain.get("text") if isinstance(plain, Mapping) and plain.get("type") == "input_text" else None
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{index}] must be text or JSON: these models read no images", where)
        texts.append(text)
    return "\n".join(texts)
