"""Structured outputs for a load test, and the JSON schema that each answer must follow, whole or cut at max_tokens.

It knows no requests and no servers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jsonschema


@dataclass(frozen=True)
class Form:
    """`structured_outputs` as a request sends it. `schema` holds for the text, or for the value that it is in JSON."""

    structured_outputs: dict[str, Any]
    schema: dict[str, Any]
    is_json: bool = False

    def error(self, text: str) -> str:
        """What is wrong with an answer; empty: nothing."""
        try:
            jsonschema.validate(json.loads(text) if self.is_json else text, self.schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return str(error).splitlines()[0]
        return ""


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": rf"^({pattern})\Z"}


_ANIMALS: dict[str, Any] = {
    "type": "array", "minItems": 5, "maxItems": 6,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,9}$"}, "kind": {"enum": ["animal", "thing"]},
        },
        "required": ["name", "kind"], "additionalProperties": False,
    },
}  # fmt: skip
# For a model that writes any text. The JSON ends before a limit of MOST_TOKENS; the others are longer than any limit.
MOST_TOKENS = 400
STORIES = (
    Form({"regex": "[A-Za-z0-9 ,.]+"}, _text("[A-Za-z0-9 ,.]+")),
    Form(
        {"grammar": 'start: (WORD " " NUMBER "; ")+\nWORD: /[a-zé]+/\nNUMBER: /[0-9]{1,4}/'},
        _text("([a-zé]+ [0-9]{1,4}; )*([a-zé]*|[a-zé]+ [0-9]{0,4};?)"),
    ),
    Form({"json": _ANIMALS}, _ANIMALS, is_json=True),
)
# For a model whose tokens are digits and a few other characters.
SUMS = (
    Form({"regex": "[0-9]+"}, _text("[0-9]+")),
    Form({"regex": "-?[1-9]{2,6}=?"}, _text("-?[1-9]{0,6}=?")),
)
