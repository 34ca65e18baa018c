"""Parts of the parsers: a buffer that finds markers, the end of a JSON value, and one call written as a JSON object.

It knows texts only; the parsers know their formats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Content, Event

_SPACE = " \t\r\n"
_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")


class Scanner:
    """The base of the parsers: text arrives in a buffer, and `_step` consumes what is certain."""

    def __init__(self) -> None:
        self._buffer = ""
        self._ended = False
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        return self._run()

    def flush(self) -> list[Event]:
        self._ended = True
        events = self._run()
        self._finish()
        return events + self._taken()

    def _run(self) -> list[Event]:
        while self._step():
            pass
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Consume a part of the buffer; False when more text is needed."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Emit what is left at the end of the answer."""

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _until(self, markers: Sequence[str]) -> tuple[str, str]:
        """Take the text before the first marker, and the marker (empty: none yet). A possible beginning of a marker
        stays in the buffer until more text arrives."""
        found = [(at, marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            text = self._take(at)
            self._take(len(marker))
            return text, marker
        return self._take(len(self._buffer) - self._held(markers)), ""

    def _held(self, markers: Sequence[str]) -> int:
        """The length of the buffer's longest end with which a marker begins."""
        if self._ended:
            return 0
        longest = max(map(len, markers), default=1)
        for length in range(min(longest - 1, len(self._buffer)), 0, -1):
            end = self._buffer[-length:]
            if any(marker.startswith(end) for marker in markers):
                return length
        return 0

    def _skip(self, characters: str) -> None:
        self._buffer = self._buffer.lstrip(characters)

    def _begins_with(self, marker: str) -> bool | None:
        """Whether the buffer begins with this marker; None when more text decides it."""
        if self._buffer.startswith(marker):
            return True
        return None if not self._ended and marker.startswith(self._buffer) else False


class ContentWriter:
    """Emits content. White space waits for the text after it, and is left out before and after tool calls."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._space = ""
        self._calls = 0

    def write(self, text: str) -> None:
        text = self._space + text
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if solid:
            self._scanner._events.append(Content(solid))

    def begin_call(self) -> int:
        """The index of the call that begins here."""
        self._space = ""
        self._calls += 1
        return self._calls - 1

    @property
    def has_calls(self) -> bool:
        return self._calls > 0

    def end(self) -> None:
        if self._space and not self._calls:
            self._scanner._events.append(Content(self._space))


class ValueEnd:
    """Finds the end of one JSON value in running text. Fed character by character; it does not validate."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.begun = False
        self.ended = False

    def accepts(self, character: str) -> bool:
        """Whether this character belongs to the value; `ended` says whether it is the last one."""
        if self.ended:
            return False
        if self._in_string:
            self._read_string(character)
            return True
        if character in _SPACE and self._depth == 0:
            self.ended = self.begun
            return False
        if character in ",}]:" and self._depth == 0:
            self.ended = True
            return False
        self.begun = True
        if character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.ended = self._depth == 0
        elif character == '"':
            self._in_string = True
        return True

    def _read_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.ended = self._depth == 0


class JsonCall:
    """Reads one call as a JSON object {"name": …, "arguments": {…}} from running text."""

    def __init__(self, content: ContentWriter) -> None:
        self._content = content
        self._index = -1
        self._name: str | None = None
        # The key that is read or whose value is read, the value's end, and its text.
        self._key: str | None = None
        self._value: ValueEnd | None = None
        self._text: list[str] = []
        self._expects = "{"
        # Arguments that are not emitted yet, because the name is not known or the text goes on.
        self._arguments: list[str] = []
        self._has_arguments = False
        # All of it while there is no name, in case that it is no call after all.
        self._raw: list[str] = []
        self.ended = self.broken = False

    def feed(self, text: str) -> tuple[int, list[Event]]:
        """The number of characters that belong to the call, and its events."""
        events: list[Event] = []
        count = 0
        while count < len(text) and not self.ended:
            self._read(text[count], events)
            if self.broken:
                break
            if self._name is None:
                self._raw.append(text[count])
            count += 1
        if self._name is not None and self._arguments:
            events.append(CallArguments(self._index, "".join(self._arguments)))
            self._arguments.clear()
        return count, events

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def _read(self, character: str, events: list[Event]) -> None:
        if self._value is not None:
            if self._value.accepts(character):
                self._keep(character)
                if self._value.ended:
                    self._end_value(events)
                return
            if not self._value.ended:
                return
            self._end_value(events)
        if character in _SPACE:
            return
        if character == "}" and self._expects in ('"', ","):
            self._end()
        elif character != self._expects:
            self.broken = True
        else:
            self._advance(character)

    def _advance(self, character: str) -> None:
        if character in {"{", ","}:
            self._expects = '"'
        elif character == '"':
            self._key, self._value, self._text = None, ValueEnd(), ['"']
            self._value.accepts('"')
        else:
            self._value, self._text = ValueEnd(), []

    def _keep(self, character: str) -> None:
        """Arguments that are an object are passed on as they come; other values are read at their end."""
        if self._key in _ARGUMENT_KEYS and (self._text or [character])[0] == "{":
            self._has_arguments = True
            self._text = ["{"]
            self._arguments.append(character)
        else:
            self._text.append(character)

    def _end_value(self, events: list[Event]) -> None:
        self._value = None
        try:
            value = json.loads("".join(self._text))
        except (ValueError, RecursionError):
            # Arguments are passed on as they are; a key or a name must be right.
            value = None
            self.broken = self._key not in _ARGUMENT_KEYS
        if self._key is None:
            self._key, self._expects = str(value), ":"
            return
        if self._key in _NAME_KEYS and isinstance(value, str) and self._name is None:
            self._name, self._index = value, self._content.begin_call()
            events.append(CallStart(self._index, value))
        elif self._key in _ARGUMENT_KEYS and isinstance(value, str):
            # Some models write the arguments as a string that holds JSON.
            self._has_arguments = True
            self._arguments.append(value)
        self._key, self._expects = None, ","

    def _end(self) -> None:
        self.ended, self.broken = self._name is not None, self._name is None
        if self.ended and not self._has_arguments:
            self._arguments.append("{}")

    @property
    def started(self) -> bool:
        return self._name is not None


def as_arguments(value: Any) -> str:
    """A value as the JSON text of a call's arguments."""
    return json.dumps(value, ensure_ascii=False)
