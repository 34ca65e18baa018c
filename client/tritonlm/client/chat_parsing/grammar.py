"""Grammars for answers with tool calls, in llguidance's Lark: free text until a call begins, then a valid call.
Without tools: JSON that may come after reasoning.

`required` leaves out the free text. Reasoning may come first. The grammar knows the checkpoint's markers by their token
ids where they are tokens, since a regular expression does not match special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tritonlm.client.chat_parsing import schema_rules
from tritonlm.client.chat_parsing.gemma_rules import gemma_arguments
from tritonlm.client.chat_parsing.tools import Function, Tools
from tritonlm.contract import InvalidRequest, tool_formats
from tritonlm.contract.tool_formats import ToolFormat

_TEXT = "TEXT: /(.|\\n)*/"
# Bounded: a weak model would write white space for ever.
_SPACE = "SPACE: /[ \\t\\r\\n]{0,8}/"
# The marker that begins calls, by format. Those without one begin calls at the beginning of an answer.
_BEGIN = {
    tool_formats.HERMES: "<tool_call>", tool_formats.QWEN_XML: "<tool_call>", tool_formats.MISTRAL: "[TOOL_CALLS]",
    tool_formats.MISTRAL_ARGS: "[TOOL_CALLS]", tool_formats.PHI4: "<|tool_call|>",
    tool_formats.GEMMA: "<start_function_call>", tool_formats.GEMMA4: "<|tool_call>",
}  # fmt: skip
_END = {
    tool_formats.HERMES: "</tool_call>", tool_formats.QWEN_XML: "</tool_call>",
    tool_formats.GEMMA: "<end_function_call>", tool_formats.GEMMA4: "<tool_call|>",
}  # fmt: skip
# The optional marker and the first character of a call, for formats that begin calls at the beginning of an answer.
_FIRST = {tool_formats.LLAMA_JSON: ("<|python_tag|>", "{"), tool_formats.PYTHONIC: ("<|python_start|>", "[")}


def tool_grammar(
    tool_format: ToolFormat, tools: Tools, tokens: Mapping[str, int], *,
    begun_reasoning: bool = False, content_schema: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The grammar of an answer. `tokens`: the ids of markers. `begun_reasoning`: the prompt ends inside reasoning.
    `content_schema`: an answer without calls is JSON that follows this schema."""
    return _Grammar(tool_format, tools, tokens, content_schema).write(begun_reasoning)


class _Grammar:
    def __init__(
        self, tool_format: ToolFormat, tools: Tools, tokens: Mapping[str, int], schema: Mapping[str, Any] | None
    ) -> None:
        self._format, self._tools, self._tokens = tool_format, tools, tokens
        self._rules: dict[str, str] = {}
        self._has_schema = schema is not None
        if schema is not None:
            self._rules["content"] = schema_rules.json_content(schema)

    def write(self, begun_reasoning: bool) -> str:
        if self._format.name == tool_formats.HARMONY:
            self._write_harmony()
        else:
            self._write_answer()
            self._write_start(begun_reasoning)
        rules = [f"{name}: {body}" for name, body in self._rules.items()]
        return "\n".join(["%llguidance {}", *rules, _TEXT, _SPACE, ""])

    def _mark(self, text: str) -> str:
        """A marker that must come here: its token, or else its text."""
        return f"<[{self._tokens[text]}]>" if text in self._tokens else quoted(text)

    def _text_until(self, name: str, marker: str) -> str:
        """The rule of all text up to a marker, which may be a token or spelled out."""
        self._rules[f"{name}_spelled[lazy]"] = f"TEXT {quoted(marker)}"
        token = f"TEXT {self._mark(marker)} | " if marker in self._tokens else ""
        self._rules[name] = f"{token}{name}_spelled"
        return name

    def _write_start(self, begun_reasoning: bool) -> None:
        tags = self._format.reasoning
        if tags is None:
            self._rules = {"start": "answer", **self._rules}
            return
        begin, end = tags
        self._text_until("reasoning", end)
        if begun_reasoning:
            # An answer may end while it reasons; where the tags are no tokens, the text would hide their end.
            unended = " | TEXT" if self._tools.mode == "auto" and end in self._tokens else ""
            start = f"reasoning answer{unended}"
        else:
            start = f"answer | SPACE {self._mark(begin)} reasoning answer"
        self._rules = {"start": start, **self._rules}

    def _write_answer(self) -> None:
        name = self._format.name
        if not self._tools.active:
            self._rules["answer"] = "SPACE content"
            return
        calls = self._calls()
        if name in _FIRST:
            marker, first = _FIRST[name]
            head = f"SPACE (calls | {self._mark(marker)} calls)" if marker in self._tokens else "SPACE calls"
            self._rules["calls"] = calls
            if self._tools.mode == "auto" and self._has_schema:
                if name == tool_formats.LLAMA_JSON:
                    # Both would begin with a brace, so the marker tells calls.
                    if marker not in self._tokens:
                        raise InvalidRequest(
                            "this model's format of tool calls cannot be distinguished from JSON; send response_format "
                            "or tools",
                            "response_format",
                        )
                    head = f"SPACE {self._mark(marker)} calls"
                head += " | SPACE content"
            elif self._tools.mode == "auto":
                tags = self._format.reasoning
                # Where the tags of reasoning are no tokens, an answer must not begin like one.
                hidden = tags[0][0] if tags is not None and tags[0] not in self._tokens else ""
                self._rules["FREE"] = f"/[^{re.escape(first + hidden)} \\t\\r\\n](.|\\n)*/"
                head += " | SPACE FREE | SPACE"
            self._rules["answer"] = head
            return
        self._rules["calls"] = calls
        if self._tools.mode == "required":
            self._rules["answer"] = f"SPACE {self._mark(_BEGIN[name])} calls"
            return
        if self._has_schema:
            # No text before the calls: its lexeme would hide that of the JSON.
            self._rules["answer"] = f"SPACE content | SPACE {self._mark(_BEGIN[name])} calls"
            return
        self._text_until("head", _BEGIN[name])
        self._rules["answer"] = "TEXT | head calls"

    def _calls(self) -> str:
        """The calls after the begin marker of the first one."""
        write: Mapping[str, Callable[[], str]] = {
            tool_formats.HERMES: lambda: self._repeated(self._json_call("arguments"), "\n", "\n"),
            tool_formats.QWEN_XML: lambda: self._repeated(self._each(self._xml_call), "\n", "\n"),
            tool_formats.GEMMA: lambda: self._repeated(self._each(self._gemma_call("<escape>")), "", ""),
            tool_formats.GEMMA4: lambda: self._repeated(self._each(self._gemma_call('<|"|>')), "", ""),
            tool_formats.MISTRAL_ARGS: lambda: self._repeated(self._each(self._argument_call), "", ""),
            tool_formats.MISTRAL: lambda: f'" "? {self._listed(self._json_call("arguments"), "[", "]")}',
            tool_formats.PHI4: lambda: (
                f"{self._listed(self._json_call('arguments'), '[', ']')} {self._optional_end('<|/tool_call|>')}"
            ),
            tool_formats.LLAMA_JSON: lambda: self._listed(self._json_call("parameters"), "", "", "; "),
            tool_formats.PYTHONIC: lambda: self._listed(self._each(self._python_call), "[", "]"),
        }
        return write[self._format.name]()

    def _more(self, rule: str) -> str:
        return f" ({rule}){{0,{self._tools.max_calls - 1}}}" if self._tools.max_calls > 1 else ""

    def _repeated(self, call: str, before: str, after: str) -> str:
        """Calls with markers around each; the first begin marker is written already."""
        end = _END.get(self._format.name)
        body = f"{_optional(before)}{call} {_optional(after)}{self._mark(end) if end else ''}"
        self._rules["call"] = body
        return "call" + self._more(f"{_optional(before)}{self._mark(_BEGIN[self._format.name])} call")

    def _listed(self, call: str, begin: str, end: str, separator: str = ", ") -> str:
        self._rules["call"] = call
        return f"{_optional(begin)}call{self._more(f'{quoted(separator)} call')} {_optional(end)}"

    def _optional_end(self, text: str) -> str:
        """An end marker that some models of the format do not have."""
        return self._mark(text) if text in self._tokens else f"{quoted(text)}?"

    def _each(self, write: Callable[[int, Function], str]) -> str:
        """One of the functions."""
        for index, function in enumerate(self._tools.callable):
            self._rules[f"call_{index}"] = write(index, function)
        return "(" + " | ".join(f"call_{index}" for index in range(len(self._tools.callable))) + ")"

    def _json_call(self, key: str) -> str:
        def write(index: int, function: Function) -> str:
            begin = f'{{"name": {json.dumps(function.name)}, "{key}": '
            return f"{quoted(begin)} {self._arguments(index, function)} {quoted('}')}"

        return self._each(write)

    def _arguments(self, index: int, function: Function) -> str:
        self._rules[f"arguments_{index}"] = schema_rules.json_arguments(function.parameters, self._is_strict(function))
        return f"arguments_{index}"

    def _is_strict(self, function: Function) -> bool:
        return function.strict or self._tools.mode == "required"

    def _argument_call(self, index: int, function: Function) -> str:
        return f"{quoted(function.name)} {self._mark('[ARGS]')} {self._arguments(index, function)}"

    def _python_call(self, index: int, function: Function) -> str:
        arguments = schema_rules.python_arguments(
            f"arguments_{index}", function, self._is_strict(function), self._rules
        )
        return f"{quoted(function.name + '(')} {arguments} {quoted(')')}"

    def _xml_call(self, index: int, function: Function) -> str:
        arguments = schema_rules.xml_arguments(f"arguments_{index}", function, self._is_strict(function), self._rules)
        return f"{quoted(f'<function={function.name}>' + chr(10))} {arguments} {quoted('</function>')}"

    def _gemma_call(self, delimiter: str) -> Callable[[int, Function], str]:
        def write(index: int, function: Function) -> str:
            mark = self._mark(delimiter)
            strict = self._is_strict(function)
            arguments = gemma_arguments(f"arguments_{index}", function, strict, mark, self._rules)
            return f"{quoted(f'call:{function.name}')} {arguments}"

        return write

    def _write_harmony(self) -> None:
        """Reasoning, then the final text or a call, as messages with channels."""
        channel, message, start = map(self._mark, ("<|channel|>", "<|message|>", "<|start|>"))
        calls = [
            f"{quoted(f'commentary to=functions.{function.name} ')} {self._mark('<|constrain|>')} "
            f"{quoted('json')} {message} {self._arguments(index, function)}"
            for index, function in enumerate(self._tools.callable)
        ]
        ended = f"{message} {self._text_until('text', '<|end|>')} {start} {quoted('assistant')}"
        content = "content" if self._has_schema else "TEXT"
        answers = ["call"] if self._tools.active else []
        if self._tools.mode != "required":
            answers.append(f"{channel} {quoted('final')} {message} {content}")
        self._rules = {
            "start": f"(reasoning){{0,8}} (preamble)? ({' | '.join(answers)})",
            "reasoning": f"{channel} {quoted('analysis')} {ended}",
            "preamble": f"{channel} {quoted('commentary')} {ended}",
            **({"call": f"{channel} ({' | '.join(calls)})"} if calls else {}),
            **self._rules,
        }


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _optional(text: str) -> str:
    return f"{quoted(text)} " if text else ""
