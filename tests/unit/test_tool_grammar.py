"""Grammars of tool calls, as llguidance compiles them: random tokens that they allow are valid calls."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes.tool_formats import FORMATS_WITH_TEXTS, Calls, write_calls
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Content, Reasoning, joined
from tritonlm.client.chat_parsing.grammar import tool_grammar
from tritonlm.client.chat_parsing.profile import ChatProfile
from tritonlm.client.chat_parsing.tools import read_tools
from tritonlm.contract import InvalidRequest, tool_formats
from tritonlm.contract.tool_formats import ToolFormat

END = "<|endoftext|>"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Bern", "São Paulo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {
            "type": "object",
            "properties": {"indoors": {"type": "boolean"}, "floor": {"type": "integer"}},
            "required": ["indoors"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["city", "where"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "noop"}},
]
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "noop": {"type": "object", "maxProperties": 0}}
REASONING = ("<think>", "</think>")


class Vocabulary:
    """A byte-level tokenizer; the markers are special tokens, added tokens, or text."""

    def __init__(self, kind: str) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens([END])
        markers = [] if kind == "text" else sorted(tool_formats.MARKERS)
        add = self.tokenizer.add_special_tokens if kind == "special" else self.tokenizer.add_tokens
        add([AddedToken(marker, special=kind == "special", normalized=False) for marker in markers])
        self.ids = {marker: self.tokenizer.token_to_id(marker) for marker in markers}
        self.end = self.tokenizer.token_to_id(END)
        self.table = LLTokenizer(self.tokenizer.to_str(), eos_token=self.end)

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.table, grammar)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        return matcher

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def accepts(self, grammar: str, text: str) -> bool:
        matcher, ids = self.matcher(grammar), self.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def random_text(self, grammar: str, rng: random.Random, begin: str = "") -> str:
        """A text of random allowed tokens; it ends as soon as it may."""
        matcher, ids = self.matcher(grammar), self.encode(begin)
        assert matcher.consume_tokens(ids)
        size = self.tokenizer.get_vocab_size()
        while not matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
            allowed = np.flatnonzero(bits)
            token = self.end if bits[self.end] else int(rng.choice(allowed))
            if token == self.end:
                break
            assert matcher.consume_token(token)
            ids.append(token)
            assert len(ids) < 3000
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


@pytest.fixture(scope="module", params=["special", "added", "text"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param)


def grammar_of(name: str, vocabulary: Vocabulary, choice: Any, reasoning: Any = None, **options: Any) -> str:
    return tool_grammar(ToolFormat(name, reasoning, native=True), read_tools(TOOLS, choice), vocabulary.ids, **options)


def read(name: str, text: str, reasoning: Any = None) -> tuple[str, Calls]:
    make = ChatProfile(ToolFormat(name, reasoning, native=True)).answer(read_tools(TOOLS)).make_parser
    assert make is not None
    parser = make()
    events = joined(parser.feed(text) + parser.flush())
    calls: Calls = []
    for event in events:
        if isinstance(event, CallStart):
            arguments = (e.text for e in events if isinstance(e, CallArguments) and e.index == event.index)
            calls.append((event.name, json.loads("".join(arguments))))
        else:
            assert isinstance(event, CallArguments | Content | Reasoning)
    return "".join(event.text for event in events if isinstance(event, Content)), calls


@pytest.mark.parametrize("name", tool_formats.FORMATS)
def test_required_calls_are_valid_for_random_tokens(name: str, vocabulary: Vocabulary) -> None:
    if name == tool_formats.HARMONY and not vocabulary.ids:
        pytest.skip("harmony's markers are tokens in every tokenizer that has it")
    grammar, rng = grammar_of(name, vocabulary, "required"), random.Random(name)
    for _ in range(4):
        text = vocabulary.random_text(grammar, rng)
        content, calls = read(name, text)
        assert calls, text
        # Harmony may have a preamble.
        assert not content or name == tool_formats.HARMONY, text
        for function, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[function])


@pytest.mark.parametrize("name", tool_formats.FORMATS)
def test_auto_allows_any_text_and_demands_a_valid_call_once_one_begins(name: str, vocabulary: Vocabulary) -> None:
    call = write_calls(name, [("weather", {"city": "Paris", "where": {"indoors": True, "floor": 2}})])
    wrong = write_calls(name, [("weather", {"city": "Rome", "where": {"indoors": True}})])
    if name == tool_formats.PYTHONIC:
        # Values are JSON.
        call, wrong = (text.replace("True", "true").replace("'", '"') for text in (call, wrong))
    if name == tool_formats.HARMONY:
        text = "<|channel|>final<|message|>Hello <b>you</b>."
    else:
        text = "Hello <b>you</b>: 1 < 2 {x} [y]."
    grammar = grammar_of(name, vocabulary, "auto")
    assert vocabulary.accepts(grammar, text)
    assert vocabulary.accepts(grammar, call)
    assert not vocabulary.accepts(grammar, wrong)
    begins = ["", "I see. "] if name in FORMATS_WITH_TEXTS else [""]
    for begin in begins:
        assert vocabulary.accepts(grammar, begin + call)
        assert not vocabulary.accepts(grammar, begin + call[: len(call) // 2])


@pytest.mark.parametrize("name", [name for name in tool_formats.FORMATS if name != tool_formats.HARMONY])
def test_reasoning_comes_first(name: str, vocabulary: Vocabulary) -> None:
    call = write_calls(name, [("noop", {})])
    for choice in ("auto", "required"):
        grammar = grammar_of(name, vocabulary, choice, REASONING)
        assert vocabulary.accepts(grammar, f"<think>\nIs 1 < 2?\n</think>\n\n{call}")
        assert vocabulary.accepts(grammar, call)
        begun = grammar_of(name, vocabulary, choice, REASONING, begun_reasoning=True)
        assert vocabulary.accepts(begun, f"Is 1 < 2?\n</think>\n\n{call}")
    assert not vocabulary.accepts(begun, call)


def test_a_named_function_is_called_once(vocabulary: Vocabulary) -> None:
    grammar = grammar_of("hermes", vocabulary, {"type": "function", "function": {"name": "noop"}})
    once = write_calls("hermes", [("noop", {})])
    assert vocabulary.accepts(grammar, once)
    assert not vocabulary.accepts(grammar, f"{once}\n{once}")
    assert not vocabulary.accepts(grammar, "no call")


def test_calls_are_parallel_unless_switched_off(vocabulary: Vocabulary) -> None:
    twice = write_calls("hermes", [("noop", {}), ("noop", {})])
    several, one = (
        tool_grammar(ToolFormat("hermes"), read_tools(TOOLS, "required", parallel), vocabulary.ids)
        for parallel in (None, False)
    )
    assert vocabulary.accepts(several, twice)
    assert not vocabulary.accepts(one, twice)


def test_an_answer_without_calls_may_have_a_schema(vocabulary: Vocabulary) -> None:
    for name in ("hermes", "mistral", "pythonic", "gemma4"):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        grammar = grammar_of(name, vocabulary, "auto", content_schema=schema)
        assert vocabulary.accepts(grammar, '{"a": 1}')
        assert vocabulary.accepts(grammar, write_calls(name, [("noop", {})]))
        assert not vocabulary.accepts(grammar, "text")


@pytest.mark.parametrize("name", ["hermes", "harmony"])
def test_json_may_come_after_reasoning(name: str) -> None:
    vocabulary = Vocabulary("special")
    reasoning = None if name == "harmony" else REASONING
    grammar = tool_grammar(
        ToolFormat(name, reasoning), read_tools(None), vocabulary.ids, content_schema={"type": "object"}
    )
    before, final = "<think>\nHm {?\n</think>\n\n", ""
    if name == "harmony":
        before = "<|channel|>analysis<|message|>Hm {?<|end|><|start|>assistant"
        final = "<|channel|>final<|message|>"
    assert vocabulary.accepts(grammar, f'{before}{final}{{"a": 1}}')
    assert vocabulary.accepts(grammar, f'{final}{{"a": 1}}')
    assert not vocabulary.accepts(grammar, f"{before}{final}text")


def test_llamas_calls_need_their_marker_beside_a_schema() -> None:
    special, text = Vocabulary("special"), Vocabulary("text")
    grammar = grammar_of("llama3_json", special, "auto", content_schema={"type": "object"})
    assert special.accepts(grammar, '{"a": 1}')
    assert special.accepts(grammar, "<|python_tag|>" + write_calls("llama3_json", [("noop", {})]))
    with pytest.raises(InvalidRequest, match="cannot be distinguished from JSON"):
        grammar_of("llama3_json", text, "auto", content_schema={"type": "object"})


def functions(parameters: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}]


def test_references_in_a_schema_work_in_every_format_of_json_values() -> None:
    schema = {
        "type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "required": ["tree"],
        "$defs": {"node": {
            "type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"], "additionalProperties": False,
        }},
    }  # fmt: skip
    vocabulary = Vocabulary("special")
    for name in ("hermes", "llama3_json", "mistral", "mistral_args", "phi4", "pythonic", "qwen_xml", "harmony"):
        grammar = tool_grammar(ToolFormat(name), read_tools(functions(schema), "required"), vocabulary.ids)
        text = write_calls(name, [("f", {"tree": {"next": {"next": None}}})]).replace("None", "null").replace("'", '"')
        assert vocabulary.accepts(grammar, text), name


@pytest.mark.parametrize("name", ["gemma", "gemma4", "qwen_xml"])
def test_what_a_format_cannot_enforce_is_refused_by_name_when_it_must_be_valid(name: str) -> None:
    schema = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]+$"}}}
    vocabulary = Vocabulary("special")
    for tools, choice in ((functions(schema), "required"), (functions(schema, strict=True), "auto")):
        with pytest.raises(InvalidRequest, match="pattern of code cannot be enforced") as error:
            tool_grammar(ToolFormat(name), read_tools(tools, choice), vocabulary.ids)
        assert error.value.param == "tools[0].function.parameters"
    grammar = tool_grammar(ToolFormat(name), read_tools(functions(schema), "auto"), vocabulary.ids)
    assert vocabulary.accepts(grammar, write_calls(name, [("f", {"code": "a"})]))


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_dates_in_arguments_exist(choice: str) -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
    vocabulary = Vocabulary("special")
    for name in ("hermes", "llama3_json", "mistral", "pythonic"):
        tools = read_tools(functions(schema, strict=True), choice)
        grammar = tool_grammar(ToolFormat(name), tools, vocabulary.ids)
        for day, exists in {"2024-02-29": True, "2023-02-29": False, "0000-09-15": False}.items():
            text = write_calls(name, [("f", {"day": day})]).replace("'", '"')
            matcher, ids = vocabulary.matcher(grammar), vocabulary.encode(text)
            assert (matcher.try_consume_tokens(ids) == len(ids)) == exists, (name, day)


def test_a_keyword_that_llguidance_does_not_know_is_an_error_only_when_it_must_hold() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    vocabulary = Vocabulary("special")
    for tools, choice, refused in (
        (functions(schema), "auto", False), (functions(schema), "required", True),
        (functions(schema, strict=True), "auto", True),
    ):  # fmt: skip
        grammar = tool_grammar(ToolFormat("hermes"), read_tools(tools, choice), vocabulary.ids)
        error = LLMatcher(vocabulary.table, grammar).get_error()
        assert ("uniqueItems" in error) == refused


def test_only_declared_parameters_are_written() -> None:
    vocabulary = Vocabulary("special")
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for schema, allowed in ((closed, False), ({**closed, "additionalProperties": True}, True)):
        grammar = tool_grammar(ToolFormat("hermes"), read_tools(functions(schema), "auto"), vocabulary.ids)
        assert vocabulary.accepts(grammar, write_calls("hermes", [("f", {"b": 1})])) == allowed
