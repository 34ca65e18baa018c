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
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax
from tritonlm.contract import InvalidRequest
from tritonlm.contract.json_schemas import keywords, place_of, with_exact_values
from tritonlm.contract.structured_outputs import CHOICE, GRAMMAR, JSON, JSON_OBJECT, NAME, REGEX

# Bounds of a grammar: the regular expressions built at its start (50,000 in a millisecond) and in a step (14,000), the
# parser's items in a step (20,000 in a millisecond), the states of its lexer (up to 2 kB each), and its symbols.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
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
# The largest number of repetitions in a regular expression: a longer forced text takes too long to tokenize.
_MOST_REPETITIONS = 10_000
_REPETITIONS = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?\s*)?\}")
# The time to convert GBNF grows with the square of its length.
_MOST_GBNF_CHARACTERS = 16_384
_MESSAGE_CHARACTERS = 400
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*?\])")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")
# The library's messages that tell a caller nothing, or name an option that no caller has.
_EXPLAINED = {
    "NoExtensionBias": "allows no text at all",
    "Too many items": "is too complex, or refers to itself without an end",
    "too many expressions": "is too large",
    "oneOf constraints are not supported": "is refused: oneOf needs alternatives that exclude each other; send anyOf",
}


def compile_grammar(structured_outputs: Mapping[str, Any], tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher before its first token. Raise InvalidRequest for a grammar that is wrong, too large or empty."""
    [(kind, content)] = structured_outputs.items()
    name = f"{NAME}.{kind}"
    matcher = LLMatcher(tokenizer, _grammar(name, kind, content), log_level=0, limits=_LIMITS)
    _check(name, matcher, content)
    _try(name, matcher.deep_copy(), content)
    return matcher


def _try(name: str, matcher: LLMatcher, content: Any) -> None:
    """Some limits are reached by the first mask or the first token only."""
    mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    _check(name, matcher, content)
    if not mask.any():
        raise InvalidRequest(f"{name} allows no text at all", name)
    # The last token is no end of text, or it is the only one.
    matcher.consume_token(int(np.flatnonzero(mask)[-1]))
    _check(name, matcher, content)


def _grammar(name: str, kind: str, content: Any) -> str:
    try:
        if kind == JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        if kind == JSON:
            return _json_grammar(name, content)
        if kind == CHOICE:
            # A terminal, which the lexer matches: a rule of many alternatives would be too large for the parser.
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in content)
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
        _check_repetitions(name, content)
        if kind == REGEX:
            return LLMatcher.grammar_from_regex(content)
        assert kind == GRAMMAR
        if is_lark_syntax(content):
            return LLMatcher.grammar_from_lark(content)
        if len(content) > _MOST_GBNF_CHARACTERS:
            raise InvalidRequest(
                f"{name} in GBNF must have at most {_MOST_GBNF_CHARACTERS} characters; write it in Lark's syntax", name
            )
        return LLMatcher.grammar_from_lark(gbnf_to_lark(content))
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
    for place, key, value in keywords(schema):
        patterns = [value] if key == "pattern" else value if key == "patternProperties" else ()
        for pattern in patterns:
            _check_repetitions(name, pattern, f" (at {place})")
    return LLMatcher.grammar_from_json_schema(json.dumps(with_exact_values(schema)), overrides=_JSON_OPTIONS)


def _check_repetitions(name: str, text: Any, where: str = "") -> None:
    for match in _REPETITIONS.finditer(text if isinstance(text, str) else ""):
        if any(len(count) > 6 or int(count) > _MOST_REPETITIONS for count in match.groups("0")):
            raise InvalidRequest(f"{name}{where}: {match[0]} repeats more than {_MOST_REPETITIONS} times", name)


def _check(name: str, matcher: LLMatcher, content: Any) -> None:
    if not matcher.is_error():
        return
    message = matcher.get_error()
    if match := _UNSUPPORTED.search(message):
        keys = json.loads(match[1])
        places = [place for key in keys if (place := place_of(content, key)) is not None]
        where = f" (at {', '.join(places)})" if places else ""
        raise InvalidRequest(f"{name}: {', '.join(keys)} is not supported{where}; leave it out", name)
    if match := _UNKNOWN_FORMAT.search(message):
        place = place_of(content, "format", match[1].strip())
        where = f" (at {place})" if place else ""
        raise InvalidRequest(f"{name}: the format {match[1].strip()} is not supported{where}; leave it out", name)
    explained = next((text for part, text in _EXPLAINED.items() if part in message), None)
    raise InvalidRequest(f"{name} {explained or f'is refused: {_short(message)}'}", name)


def _short(message: str) -> str:
    """The message on one line."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "…"
