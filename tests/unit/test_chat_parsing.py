"""Parsers of answers with tool calls: each format, in any cut, and what is no valid call."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fakes.tool_formats import FORMATS_WITH_TEXTS, Calls, write_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm.client.chat_parsing.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Parser,
    Reasoning,
    joined,
)
from tritonlm.client.chat_parsing.profile import ChatProfile
from tritonlm.client.chat_parsing.tools import read_tools
from tritonlm.contract import CheckpointError, tool_formats
from tritonlm.contract.tool_formats import may_begin_in_reasoning, tool_format_of

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "noop")
]
# Characters that parsers might take for their own.
NASTY = st.text(st.sampled_from(" \n{}[]()\"'\\,:;=<>|/_aé猫"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | NASTY,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["k", "l"]), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "x"]), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "noop"]), ARGUMENTS), min_size=1, max_size=3)


def profile_of(name: str, reasoning: bool = False) -> ChatProfile:
    template = "{{ tools }}" + ("<think></think>" if reasoning else "")
    return ChatProfile(tool_format_of(template, name), template)


def read(parser: Parser, parts: Sequence[str]) -> list[Event]:
    events: list[Event] = []
    for part in parts:
        events += parser.feed(part)
    return joined(events + parser.flush())


def parsed(make: Callable[[], Parser] | None, text: str, cuts: Sequence[int] = ()) -> list[Event]:
    """The events of a text, which are the same in one piece and cut up."""
    assert make is not None
    whole = read(make(), [text])
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(make(), [text[begin:end] for begin, end in itertools.pairwise(edges)]) == whole
    assert read(make(), list(text)) == whole
    return whole


def parsed_as(name: str, text: str, **options: Any) -> list[Event]:
    return parsed(profile_of(name, **options).answer(read_tools(TOOLS)).make_parser, text)


def calls_of(events: Sequence[Event]) -> Calls:
    starts = [event for event in events if isinstance(event, CallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    return [
        (
            start.name,
            json.loads("".join(e.text for e in events if isinstance(e, CallArguments) and e.index == start.index)),
        )
        for start in starts
    ]


def content_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


@pytest.mark.parametrize("name", tool_formats.FORMATS)
def test_every_format_comes_back_in_any_cut(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        calls=CALLS, cuts=st.lists(st.integers(0, 200), max_size=6), text=st.sampled_from(["", "Let me see.", "a < b"])
    )
    def hold(calls: Calls, cuts: list[int], text: str) -> None:
        calls = calls[:1] if name == tool_formats.HARMONY else calls
        if name not in FORMATS_WITH_TEXTS:
            text = ""
        make = profile_of(name).answer(read_tools(TOOLS)).make_parser
        events = parsed(make, text + write_calls(name, calls), cuts)
        assert calls_of(events) == calls
        assert content_of(events) == text

    hold()


@pytest.mark.parametrize("name", tool_formats.FORMATS)
def test_any_text_loses_nothing_but_white_space(name: str) -> None:
    markers = sorted(tool_formats.MARKERS)
    parts = st.lists(
        NASTY | st.sampled_from([*markers, "call:weather{", "{}", '{"name": "noop"', "[noop(", ")]"]), max_size=8
    )

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(parts=parts, cuts=st.lists(st.integers(0, 100), max_size=4))
    def hold(parts: list[str], cuts: list[int]) -> None:
        text = "".join(parts)
        events = parsed(profile_of(name, reasoning=True).answer(read_tools(TOOLS)).make_parser, text, cuts)
        if not any(marker in text for marker in markers) and not any(isinstance(e, CallStart) for e in events):
            assert content_of(events) == text or name in (tool_formats.PYTHONIC, tool_formats.LLAMA_JSON)
            assert content_of(events).split() == text.split()

    hold()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})]),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]', [("f", {})]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", [("f", {})]),
        ("phi4", 'functools[{"name": "f", "arguments": {"a": [1]}}]', [("f", {"a": [1]})]),
        ("pythonic", "<|python_start|>[a.f(x={'k': null})]<|python_end|>", [("a.f", {"x": {"k": None}})]),
        ("gemma4", '<|tool_call>call:f{<|"|>quoted<|"|>:1}<tool_call|>', [("f", {"quoted": 1})]),
        ("qwen_xml", "<tool_call><function=f><parameter=a>[1]</parameter></function></tool_call>", [("f", {"a": [1]})]),
        ("harmony", '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}', [("f", {})]),
    ],
)  # fmt: skip
def test_variants_of_the_formats(name: str, text: str, expected: Calls) -> None:
    assert calls_of(parsed_as(name, text)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "see <tool_call>\nnothing</tool_call>!"), ("hermes", '<tool_call>{"a": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}'), ("hermes", '<tool_call>{"name": "f'),
        ("llama3_json", '{"answer": [42]}'), ("pythonic", "[1, 2] are numbers"), ("pythonic", "[f(1)]"),
        ("pythonic", "[f(a=b)]"), ("pythonic", "[f(a=1"), ("mistral", "[TOOL_CALLS]"), ("phi4", "import functools"),
        ("gemma", "<start_function_call>call:f{a:}<end_function_call>"), ("gemma", "<start_function_call>call:f{a"),
        ("qwen_xml", "<tool_call><function=f>text</function></tool_call>"), ("harmony", "no channel"),
    ],
)  # fmt: skip
def test_what_is_no_call_stays_content(name: str, text: str) -> None:
    events = parsed_as(name, text)
    assert (calls_of(events), content_of(events)) == ([], text)


def test_a_call_that_is_cut_off_keeps_its_arguments_so_far() -> None:
    assert parsed_as("hermes", 'ok <tool_call>{"name": "f", "arguments": {"city": "Pa') == [
        Content("ok"), CallStart(0, "f"), CallArguments(0, '{"city": "Pa'),
    ]  # fmt: skip


def test_arguments_arrive_while_they_are_written() -> None:
    make = profile_of("hermes").answer(read_tools(TOOLS)).make_parser
    assert make is not None
    parser = make()
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": {"city": "Pa') != []
    assert joined(parser.feed("ris, ")) == [CallArguments(0, "ris, ")]


class TestReasoning:
    def test_tags_begin_an_answer(self) -> None:
        text = '<think>\nIs <tool_call> right?\n</think>\n\nYes.<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        assert parsed_as("hermes", text, reasoning=True) == [
            Reasoning("Is <tool_call> right?"), Content("Yes."), CallStart(0, "f"), CallArguments(0, "{}"),
        ]  # fmt: skip

    def test_a_prompt_may_have_begun_it(self) -> None:
        profile = profile_of("hermes", reasoning=True)
        begun = profile.answer(read_tools(None), "…assistant\n<think>\n").make_parser
        closed = profile.answer(read_tools(None), "…assistant\n<think>\n\n</think>\n\n").make_parser
        assert parsed(begun, "so</think>\nYes. ") == [Reasoning("so"), Content("Yes. ")]
        assert parsed(closed, "so</think>") == [Content("so</think>")]

    def test_tags_later_in_an_answer_are_text(self) -> None:
        assert parsed_as("hermes", "The tag <think> begins it.", reasoning=True) == [
            Content("The tag <think> begins it.")
        ]

    def test_harmony_has_channels(self) -> None:
        text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>"
        profile = profile_of("harmony")
        assert parsed(profile.answer(read_tools(None)).make_parser, text) == [Reasoning("hm"), Content("Hello.")]
        as_content = profile.answer(read_tools(None), separate_reasoning=False)
        assert as_content.make_parser is None
        with_tools = profile.answer(read_tools(TOOLS), separate_reasoning=False)
        assert parsed(with_tools.make_parser, text) == [Content("hmHello.")]

    def test_it_can_be_switched_off(self) -> None:
        answer = profile_of("hermes", reasoning=True).answer(read_tools(None), separate_reasoning=False)
        assert answer.make_parser is None


def test_without_tools_and_reasoning_there_is_no_parser() -> None:
    assert profile_of("hermes").answer(read_tools(None)).make_parser is None
    assert profile_of("hermes").answer(read_tools(TOOLS, "none")).make_parser is None


def test_special_tokens_are_shown_for_their_markers_and_left_out_otherwise() -> None:
    about = {
        "chat_template": "[TOOL_CALLS]{{ tools }}",
        "chat_tokens": {"[TOOL_CALLS]": [5, True], "</s>": [2, True], "[/INST]": [4, True]},
    }
    answer = ChatProfile.of(about).answer(read_tools(TOOLS))
    assert answer.shows_special_tokens
    assert answer.short_ids
    events = parsed(answer.make_parser, 'a[/INST]b[TOOL_CALLS][{"name": "f", "arguments": {"s": "</s>"}}]</s>')
    assert events == [Content("ab"), CallStart(0, "f"), CallArguments(0, '{"s": ""}')]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<|im_start|>{{ messages }}", "hermes"), ("{{ tools }}<tool_call>", "hermes"), (None, "hermes"),
        ("<tool_call>\n<function=x>{{ tools }}", "qwen_xml"), ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS]{{ tools }}[ARGS]", "mistral_args"), ('{"name": …, "parameters": …}{{ tools }}', "llama3_json"),
        ("<|python_tag|>{{ tools }}", "llama3_json"), ("[func_name1(params_name1=x)]{{ tools }}", "pythonic"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi4"), ("<start_function_call>{{ tools }}", "gemma"),
        ("<|tool_call>{{ tools }}", "gemma4"), ("<|channel|>analysis{{ tools }}", "harmony"),
    ],
)  # fmt: skip
def test_the_format_is_recognized_from_the_template(template: str | None, name: str) -> None:
    recognized = tool_format_of(template)
    assert recognized.name == name
    assert recognized.native == ("tools" in (template or ""))
    assert tool_format_of(template, "phi4").name == "phi4"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="tool_format must be auto or one of hermes"):
        tool_format_of("", "xml")


@pytest.mark.parametrize(
    ("end", "may"),
    [
        ("{{ '<|im_start|>assistant\\n' }}", False), ("{{ '<Assistant><think>\\n' }}", True),
        ("{{ 'a' }}{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}", False),
    ],
)  # fmt: skip
def test_whether_a_prompt_may_end_inside_reasoning(end: str, may: bool) -> None:
    template = "<think>{{ x }}</think>{% if add_generation_prompt %}" + end + "{% endif %}"
    assert may_begin_in_reasoning(template, ("<think>", "</think>")) == may


def test_a_declared_response_template_parses_answers() -> None:
    declared = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open": "<call>", "close": "</call>", "content": "json", "repeats": True,
                "transform": {"function": {"name": "{content.name}", "arguments": "{content.args}"}},
            },
            "content": {"close": "<|im_end|>"},
        },
    }  # fmt: skip
    profile = ChatProfile.of({"chat_template": "", "response_template": declared})
    assert profile.needs_prompt(continues=False)
    make = profile.answer(read_tools(TOOLS), "<|im_start|>assistant\n").make_parser
    assert make is not None
    text = '<think>hm</think>Yes.<call>{"name": "noop", "args": {"a": 1}}</call>'
    assert parsed(make, text) == [
        Reasoning("hm"), Content("Yes."), CallStart(0, "noop"), CallArguments(0, '{"a": 1}'),
    ]  # fmt: skip
    assert parsed(make, "<call>no JSON</call>") == [Content("no JSON")]
    tokens = {token: [number, True] for number, token in enumerate(["<call>", "<|im_end|>", "<pad>"])}
    about = {"chat_template": "", "response_template": declared, "chat_tokens": tokens}
    answer = ChatProfile.of(about).answer(read_tools(TOOLS), "<|im_start|>assistant\n")
    assert answer.shows_special_tokens
    assert parsed(answer.make_parser, "Yes.<pad><|im_end|>") == [Content("Yes.")]
