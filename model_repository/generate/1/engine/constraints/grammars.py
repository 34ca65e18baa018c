"""Compiles `structured_outputs` to a matcher of llguidance, or refuses it with the place of the mistake.

What llguidance does not support is refused by name; its option to ignore such keywords is off. It knows grammars, and
neither requests nor threads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from tritonlm.contract import InvalidRequest
from tritonlm.contract.structured_outputs import CHOICE, GRAMMAR, JSON, JSON_OBJECT, NAME, REGEX

# Bounds of a grammar: the regular expressions built at its start (50,000 in a millisecond) and in a step (14,000), the
# parser's items in a step (20,000 in a millisecond), the states of its lexer (up to 2 kB each), and its symbols.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=10_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# JSON is written on one line, as Python's json.dumps does: so more of it is forced, and no model stalls in white space.
# An answer that fits several alternatives of oneOf would be wrong, so they are not treated as anyOf.
_JSON_OPTIONS: Any = {
    "lenient": False, "coerce_one_of": False,
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ",
}  # fmt: skip
_OPTIONS_KEY = "x-guidance"
_MESSAGE_CHARACTERS = 400
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*?\])")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")


def compile_grammar(structured_outputs: Mapping[str, Any], tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher before its first token. Raise InvalidRequest for a grammar that is wrong, too large or empty."""
    [(kind, content)] = structured_outputs.items()
    name = f"{NAME}.{kind}"
    matcher = LLMatcher(tokenizer, _grammar(name, kind, content), log_level=0, limits=_LIMITS)
    _check(name, matcher, content)
    # Some limits are reached by the first mask only.
    probe = matcher.deep_copy()
    mask = np.frombuffer(probe.compute_bitmask(), np.uint8)
    _check(name, probe, content)
    if not mask.any():
        raise InvalidRequest(f"{name} allows no text at all", name)
    return matcher


def _grammar(name: str, kind: str, content: Any) -> str:
    try:
        if kind == JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        if kind == JSON:
            return _json_grammar(name, content)
        if kind == REGEX:
            return LLMatcher.grammar_from_regex(content)
        if kind == CHOICE:
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in content)
            )
        assert kind == GRAMMAR
        return LLMatcher.grammar_from_lark(any_to_lark(content))
    except InvalidRequest:
        raise
    except Exception as error:  # the converter of GBNF raises nothing narrower
        raise InvalidRequest(f"{name} cannot be read: {_short(str(error))}", name) from None


def _json_grammar(name: str, schema: dict[str, Any] | bool) -> str:
    if schema is False:
        raise InvalidRequest(f"{name} is false, which allows no text at all", name)
    schema = {} if schema is True else schema
    if _OPTIONS_KEY in schema:
        raise InvalidRequest(f"{name}: the key {_OPTIONS_KEY!r} is not supported; leave it out", name)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)


def _check(name: str, matcher: LLMatcher, content: Any) -> None:
    if not matcher.is_error():
        return
    message = matcher.get_error()
    if match := _UNSUPPORTED.search(message):
        keys = json.loads(match[1])
        places = [place for key in keys if (place := _place_of(content, key)) is not None]
        where = f" (at {', '.join(places)})" if places else ""
        raise InvalidRequest(f"{name}: {', '.join(keys)} is not supported{where}; leave it out", name)
    if match := _UNKNOWN_FORMAT.search(message):
        place = _place_of(content, "format", match[1].strip())
        where = f" (at {place})" if place else ""
        raise InvalidRequest(f"{name}: the format {match[1].strip()} is not supported{where}; leave it out", name)
    raise InvalidRequest(f"{name} is refused: {_short(message)}", name)


def _place_of(schema: Any, key: str, value: str | None = None) -> str | None:
    """The JSON pointer of the first such key in a schema, or of the first with this value."""
    pending: list[tuple[str, Any]] = [("", schema)]
    while pending:
        path, item = pending.pop(0)
        if isinstance(item, Mapping):
            # A property may have the name of a keyword.
            is_map = path.rpartition("/")[2] in ("properties", "patternProperties", "$defs", "definitions")
            if key in item and not is_map and value in (None, item[key]):
                return f"{path}/{key}"
            pending += [(f"{path}/{name}", inner) for name, inner in item.items()]
        elif isinstance(item, list):
            pending += [(f"{path}/{index}", inner) for index, inner in enumerate(item)]
    return None


def _short(message: str) -> str:
    """The message on one line."""
    text = " ".join(message.split())
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "…"
