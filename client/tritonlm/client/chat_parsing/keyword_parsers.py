"""Parsers of calls whose arguments are not JSON: Python calls, Gemma's `call:name{…}`, Qwen's XML.

Arguments are translated to JSON when a call is complete, so they arrive as one piece. What is no valid call stays
content, markers included.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from tritonlm.client.chat_parsing.events import CallArguments, CallStart
from tritonlm.client.chat_parsing.scanning import ContentWriter, Scanner, as_arguments

_SPACE = " \t\r\n"
_JSON_NAMES = {"true": True, "false": False, "null": None}
# An unfinished call is content in the end; one that is longer than this, at once.
_MAX_CALL_CHARACTERS = 1_000_000
Call = tuple[str, dict[str, Any]]


class _BlockParser(Scanner):
    """The base: content until a begin marker, then a block up to its end, which `_read` turns into calls."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._content = ContentWriter(self)
        self._marker = ""
        self._block = ""

    def _step(self) -> bool:
        if not self._marker:
            text, self._marker = self._until(self.begins)
            if text:
                self._content.write(text)
            return bool(self._marker)
        text, end = self._until(self.ends)
        self._block += text
        if not end and len(self._block) < _MAX_CALL_CHARACTERS:
            return False
        self._end_block(end)
        return True

    def _end_block(self, end: str) -> None:
        block, marker = self._block, self._marker
        self._block = self._marker = ""
        try:
            calls = self._read(block)
        except (ValueError, SyntaxError, RecursionError, MemoryError, IndexError, TypeError):
            self._content.write(marker + block + end)
            return
        for name, arguments in calls:
            index = self._content.begin_call()
            self._events += [CallStart(index, name), CallArguments(index, as_arguments(arguments))]

    def _read(self, block: str) -> list[Call]:
        """The calls of a block; raises ValueError or a like error if it is none."""
        raise NotImplementedError

    def _finish(self) -> None:
        if self._marker:
            # Complete but for its end marker, or cut off.
            self._end_block("")
        self._content.end()


class PythonicParser(Scanner):
    """[name(key=value, …), …] at the beginning of an answer, also between <|python_start|> and <|python_end|>."""

    def __init__(self) -> None:
        super().__init__()
        self._content = ContentWriter(self)
        self._state = self._begin
        self._read_to = self._depth = 0
        self._quote = ""
        self._prefix = ""

    def _step(self) -> bool:
        return self._state()

    def _begin(self) -> bool:
        text = self._buffer.lstrip(_SPACE)
        if not text or (not self._ended and "<|python_start|>".startswith(text) and text != "<|python_start|>"):
            return False
        if text.startswith("<|python_start|>"):
            self._prefix, self._buffer = "<|python_start|>", text[len("<|python_start|>") :]
            return True
        self._state = self._in_list if text[0] == "[" else self._in_content
        if text[0] == "[":
            self._take(len(self._buffer) - len(text))
        return True

    def _in_list(self) -> bool:
        """Find the end of the list: brackets count outside of strings."""
        end = -1
        while self._read_to < len(self._buffer) and end < 0:
            character = self._buffer[self._read_to]
            if self._quote:
                if character == "\\":
                    self._read_to += 1
                elif character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                end = self._read_to if self._depth == 0 else -1
            self._read_to += 1
        if end < 0:
            return False
        self._write_calls(self._take(end + 1))
        self._state = self._in_content
        return True

    def _write_calls(self, text: str) -> None:
        try:
            calls = python_calls(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            self._content.write(self._prefix + text)
            return
        for name, arguments in calls:
            index = self._content.begin_call()
            self._events += [CallStart(index, name), CallArguments(index, as_arguments(arguments))]

    def _in_content(self) -> bool:
        text, marker = self._until(("<|python_end|>",))
        if text and not (self._content.has_calls and not text.strip()):
            self._content.write(text)
        return bool(marker)

    def _finish(self) -> None:
        if self._buffer:
            self._content.write(self._prefix + self._buffer)
        self._content.end()


def python_calls(text: str) -> list[Call]:
    """The calls of a Python list of calls with keyword arguments of literals; names of JSON's constants are allowed."""
    body = ast.parse(text.strip(), mode="eval").body
    if not isinstance(body, ast.List) or not body.elts:
        raise ValueError("not a list of calls")
    calls = []
    for call in body.elts:
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not a call with keyword arguments")
        arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        if len(arguments) != len(call.keywords):
            raise ValueError("arguments must have names")
        # Names of functions may have dots and, in an expression, minus signs are not possible.
        calls.append((ast.unparse(call.func), arguments))
    json.dumps(calls)
    return calls


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None
        }
    return ast.literal_eval(node)


class GemmaParser(_BlockParser):
    """call:name{key:value, …} between markers; strings stand between delimiters of their own."""

    def __init__(self, begin: str, end: str, delimiter: str) -> None:
        super().__init__()
        self.begins, self.ends = (begin,), (end,)
        self._delimiter = delimiter

    def _read(self, block: str) -> list[Call]:
        match = re.fullmatch(r"\s*call:([^{\s]+)\s*(\{.*\})\s*", block, re.DOTALL)
        if match is None:
            raise ValueError("not a call")
        reader = _GemmaValue(match[2], self._delimiter)
        arguments = reader.value()
        if reader.rest() or not isinstance(arguments, dict):
            raise ValueError("not a call")
        return [(match[1], arguments)]


class _GemmaValue:
    """Reads {key:value,…}, [value,…], delimited strings, numbers and constants."""

    def __init__(self, text: str, delimiter: str) -> None:
        self._text, self._at, self._delimiter = text, 0, delimiter

    def rest(self) -> str:
        return self._text[self._at :]

    def value(self) -> Any:
        self._skip_space()
        if self._text.startswith(self._delimiter, self._at):
            return self._string()
        if self._text[self._at] == "{":
            return self._object()
        if self._text[self._at] == "[":
            return self._list()
        match = re.compile(r"[^,}\]]+").match(self._text, self._at)
        if match is None:
            raise ValueError("a value is missing")
        self._at = match.end()
        return json.loads(match[0])

    def _skip_space(self) -> None:
        while self._text[self._at].isspace():
            self._at += 1

    def _string(self) -> str:
        begin = self._at + len(self._delimiter)
        end = self._text.index(self._delimiter, begin)
        self._at = end + len(self._delimiter)
        return self._text[begin:end]

    def _object(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while self._goes_on("}"):
            if self._text.startswith(self._delimiter, self._at):
                key = self._string()
            else:
                end = self._text.index(":", self._at)
                key, self._at = self._text[self._at : end].strip(), end
            self._skip_space()
            if self._text[self._at] != ":":
                raise ValueError("a colon is missing")
            self._at += 1
            values[key] = self.value()
        return values

    def _list(self) -> list[Any]:
        values = []
        while self._goes_on("]"):
            values.append(self.value())
        return values

    def _goes_on(self, end: str) -> bool:
        """Move over the bracket or the comma before an item; False, and over the end, if there is none."""
        self._skip_space()
        if self._text[self._at] != end:
            if self._text[self._at] not in "{[,":
                raise ValueError("a comma is missing")
            self._at += 1
            self._skip_space()
        if self._text[self._at] != end:
            return True
        self._at += 1
        return False


class QwenXmlParser(_BlockParser):
    """<function=name><parameter=key>value</parameter>…</function> between <tool_call> tags."""

    begins = ("<tool_call>",)
    ends = ("</tool_call>",)
    _FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
    _PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        """`schemas`: the parameters of each tool, which tell a number from a string of digits."""
        super().__init__()
        self._schemas = schemas

    def _read(self, block: str) -> list[Call]:
        function = self._FUNCTION.fullmatch(block)
        if function is None:
            raise ValueError("not a call")
        name, body, at = function[1], function[2], 0
        arguments: dict[str, Any] = {}
        schema = self._schemas.get(name)
        properties = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
        for match in self._PARAMETER.finditer(body):
            if match.start() != at:
                raise ValueError("text between parameters")
            at = match.end()
            arguments[match[1]] = _xml_value(match[2], properties.get(match[1]))
        if body[at:].strip():
            raise ValueError("text after the parameters")
        return [(name, arguments)]


def _xml_value(text: str, schema: Any) -> Any:
    """A parameter's text as JSON, unless its schema says that it is a string."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
