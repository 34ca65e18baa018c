"""What a checkpoint's chats need: its format of tool calls, its markers, and the parser and grammar for one chat.

It is made of the engine's report `about`. It knows nothing of requests to an engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tritonlm.client.chat_parsing import parsers, response_template
from tritonlm.client.chat_parsing.events import Content, Event, Parser, Reasoning
from tritonlm.client.chat_parsing.grammar import tool_grammar
from tritonlm.client.chat_parsing.harmony import HarmonyParser
from tritonlm.client.chat_parsing.keyword_parsers import GemmaParser, PythonicParser, QwenXmlParser
from tritonlm.client.chat_parsing.reasoning import ReasoningParser, TokenFilter
from tritonlm.client.chat_parsing.tools import Tools
from tritonlm.contract import tool_formats
from tritonlm.contract.tool_formats import MARKERS, ToolFormat

# Templates that show one call in an answer only.
_SINGLE_CALL = "single tool-calls"
_MISTRAL = (tool_formats.MISTRAL, tool_formats.MISTRAL_ARGS)


@dataclass(frozen=True)
class Answer:
    """How one chat's answer is constrained and read."""

    # None: the text is the content.
    make_parser: Callable[[], Parser] | None = None
    grammar: str | None = None
    # Markers of the format are special tokens, which texts leave out otherwise.
    shows_special_tokens: bool = False
    # Mistral's templates demand ids of nine letters and digits.
    short_ids: bool = False

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the request that follow from it."""
        grammar = {} if self.grammar is None else {"structured_outputs": {"grammar": self.grammar}}
        return grammar | ({"skip_special_tokens": False} if self.shows_special_tokens else {})


@dataclass(frozen=True)
class ChatProfile:
    format: ToolFormat
    template: str = ""
    # The ids of the added tokens that matter, and which of them are special.
    tokens: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    response_template: dict[str, Any] | None = None

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> ChatProfile:
        """From the report of an engine; one of an older release reports less."""
        template, setting = about.get("chat_template") or "", about.get("tool_format")
        with_tools = tool_formats.tool_template(template, about.get("tool_use_template"), setting)
        if with_tools != template:
            # What a text of either means is recognized: chats without tools have the other one.
            template = f"{with_tools}\n{template}"
        tokens = about.get("chat_tokens") or {}
        declared = about.get("response_template")
        return cls(
            tool_formats.tool_format_of(template, setting),
            template,
            {text: entry[0] for text, entry in tokens.items()},
            frozenset(text for text, entry in tokens.items() if entry[1]),
            declared if isinstance(declared, dict) else None,
        )

    @property
    def declares_response_template(self) -> bool:
        return self.response_template is not None and response_template.is_installed()

    def takes_effort(self, effort: str) -> bool:
        """Whether the chat template has a variable for how much the model reasons."""
        return bool(tool_formats.effort_variables(self.template, effort))

    def needs_prompt(self, *, continues: bool) -> bool:
        """Whether the answer can only be read with the rendered prompt, because that may begin a part of it."""
        if self.response_template is not None:
            return True
        tags = self.format.reasoning
        return tags is not None and (continues or tool_formats.may_begin_in_reasoning(self.template, tags))

    def answer(
        self, tools: Tools, prompt: str = "", *, separate_reasoning: bool = True, hides_special_tokens: bool = True,
        constrained: bool = False, content_schema: Mapping[str, Any] | None = None,
    ) -> Answer:  # fmt: skip
        """`prompt`: the rendered chat, if `needs_prompt`. `constrained`: the request limits the text, maybe by the
        schema of its content; then what is no content comes before it, or there is nothing to read."""
        if _SINGLE_CALL in self.template:
            tools = replace(tools, max_calls=1)
        reasons = self.format.reasoning is not None or self.format.name == tool_formats.HARMONY
        reads = tools.active or (reasons and separate_reasoning) or self.response_template is not None
        schema_after_reasoning = reasons and separate_reasoning and content_schema is not None
        if not reads or (constrained and not tools.active and not schema_after_reasoning):
            return Answer()
        begun = self._begins_in_reasoning(prompt)
        grammar = None
        if tools.active or constrained:
            grammar = tool_grammar(
                self.format, tools, self.tokens, begun_reasoning=begun, content_schema=content_schema
            )
        markers = self._special_markers()
        shows = bool(markers)
        hidden = tuple(sorted(self.special - markers)) if shows and hides_special_tokens else ()

        def make_parser() -> Parser:
            parser = self._parser(tools, prompt, begun, separate_reasoning)
            return TokenFilter(hidden, parser) if hidden else parser

        return Answer(make_parser, grammar, shows, self.format.name in _MISTRAL)

    def _special_markers(self) -> frozenset[str]:
        """The special tokens that the parser reads."""
        if self.declares_response_template:
            declared = json.dumps(self.response_template, ensure_ascii=False)
            return frozenset(token for token in self.special if token in declared)
        return self.special & MARKERS

    def _begins_in_reasoning(self, prompt: str) -> bool:
        tags = self.format.reasoning
        return tags is not None and prompt.rfind(tags[0]) > prompt.rfind(tags[1])

    def _parser(self, tools: Tools, prompt: str, begun: bool, separate_reasoning: bool) -> Parser:
        if self.declares_response_template:
            assert self.response_template is not None
            parser: Parser = response_template.ResponseTemplateParser(self.response_template, prompt, tools.definitions)
            return parser if separate_reasoning else _ReasoningAsContent(parser)
        if self.format.name == tool_formats.HARMONY:
            return HarmonyParser() if separate_reasoning else _ReasoningAsContent(HarmonyParser())
        answer = self._call_parser(tools) if tools.active else parsers.PlainParser()
        if self.format.reasoning is None or not separate_reasoning:
            return answer
        return ReasoningParser(self.format.reasoning, answer, begun)

    def _call_parser(self, tools: Tools) -> Parser:
        make: dict[str, Callable[[], Parser]] = {
            tool_formats.HERMES: lambda: parsers.JsonParser(parsers.HERMES_MARKERS),
            tool_formats.QWEN_XML: lambda: QwenXmlParser(tools.schemas),
            tool_formats.LLAMA_JSON: lambda: parsers.JsonParser(parsers.LLAMA_MARKERS),
            tool_formats.PYTHONIC: PythonicParser,
            tool_formats.MISTRAL: parsers.MistralParser,
            tool_formats.MISTRAL_ARGS: parsers.MistralParser,
            tool_formats.PHI4: lambda: parsers.JsonParser(parsers.PHI4_MARKERS),
            tool_formats.GEMMA: lambda: GemmaParser("<start_function_call>", "<end_function_call>", "<escape>"),
            tool_formats.GEMMA4: lambda: GemmaParser("<|tool_call>", "<tool_call|>", '<|"|>'),
        }
        return make[self.format.name]()


class _ReasoningAsContent:
    """The switch `separate_reasoning: false` for formats whose parser tells reasoning in any case."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Event]:
        return [_as_content(event) for event in self._parser.feed(text)]

    def flush(self) -> list[Event]:
        return [_as_content(event) for event in self._parser.flush()]


def _as_content(event: Event) -> Event:
    return Content(event.text) if isinstance(event, Reasoning) else event
