"""Parsers of calls that are JSON objects between markers: Hermes and Qwen, Llama 3, Mistral, Phi-4.

What is no valid call stays content, markers included, so that nothing of an answer is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Content
from tritonlm.client.chat_parsing.scanning import ContentWriter, JsonCall, Scanner, ValueEnd

_SPACE = " \t\r\n"


class PlainParser(Scanner):
    """All of the answer is content."""

    def _step(self) -> bool:
        if self._buffer:
            self._events.append(Content(self._take(len(self._buffer))))
        return False


@dataclass(frozen=True)
class JsonMarkers:
    """How a format marks calls: before and after each, or before and after a list of them."""

    begins: tuple[str, ...]
    ends: tuple[str, ...] = ()
    # Between calls after one begin.
    separators: str = ""
    # An answer that begins with a brace is a call, too.
    bare: bool = False


HERMES_MARKERS = JsonMarkers(("<tool_call>",), ("</tool_call>",))
LLAMA_MARKERS = JsonMarkers(("<|python_tag|>",), separators=";,", bare=True)
MISTRAL_MARKERS = JsonMarkers(("[TOOL_CALLS]",), separators="[],")
PHI4_MARKERS = JsonMarkers(("<|tool_call|>", "functools["), ("<|/tool_call|>",), separators="[],")


class JsonParser(Scanner):
    """Content until a marker, then calls {"name": …, "arguments": {…}}."""

    def __init__(self, markers: JsonMarkers) -> None:
        super().__init__()
        self._markers = markers
        self._content = ContentWriter(self)
        self._state = self._begin
        self._call: JsonCall | None = None
        # The text since the last content: it becomes content again if no call follows.
        self._skipped = ""

    def _step(self) -> bool:
        return self._state()

    def _begin(self) -> bool:
        """At the beginning of the answer."""
        text = self._buffer.lstrip(_SPACE)
        if not text:
            return False
        if self._markers.bare and text[0] == "{":
            self._skipped = self._take(len(self._buffer) - len(text))
            self._call, self._state = JsonCall(self._content), self._in_call
        else:
            self._state = self._in_content
        return True

    def _in_content(self) -> bool:
        text, marker = self._until(self._markers.begins)
        if text:
            self._content.write(text)
        if marker:
            self._skipped, self._state = marker, self._before_call
        return bool(marker)

    def _before_call(self) -> bool:
        rest = self._buffer.lstrip(_SPACE + "[")
        if not rest:
            return False
        self._skipped += self._take(len(self._buffer) - len(rest))
        if rest[0] == "{":
            self._call, self._state = JsonCall(self._content), self._in_call
        else:
            self._give_up()
        return True

    def _in_call(self) -> bool:
        assert self._call is not None
        count, events = self._call.feed(self._buffer)
        self._events += events
        self._take(count)
        if self._call.broken and not self._call.started:
            self._skipped += self._call.raw
            self._give_up()
            return True
        if self._call.ended or self._call.broken:
            self._call, self._skipped, self._state = None, "", self._after_call
        return bool(self._buffer)

    def _after_call(self) -> bool:
        """After one call: a separator and the next one, the end marker, or content."""
        rest = self._buffer.lstrip(_SPACE + self._markers.separators)
        if not rest:
            return False
        if rest[0] == "{" and self._markers.separators:
            self._take(len(self._buffer) - len(rest))
            self._call, self._state = JsonCall(self._content), self._in_call
            return True
        for marker in self._markers.ends:
            held = rest.startswith(marker)
            if not held and not self._ended and marker.startswith(rest):
                return False
            if held:
                self._take(len(self._buffer) - len(rest) + len(marker))
                self._state = self._in_content
                return True
        self._skip(_SPACE + self._markers.separators)
        self._state = self._in_content
        return True

    def _give_up(self) -> None:
        self._content.write(self._skipped)
        self._call, self._skipped, self._state = None, "", self._in_content

    def _finish(self) -> None:
        if self._call is not None and not self._call.started:
            self._content.write(self._skipped + self._call.raw)
        elif self._call is None and self._state != self._after_call:
            self._content.write(self._skipped + self._buffer)
        self._content.end()


class MistralParser(JsonParser):
    """Both forms of Mistral: [TOOL_CALLS][{"name": …}, …], and [TOOL_CALLS]name[ARGS]{…} once for each call, which may
    hold [CALL_ID]… before [ARGS]."""

    def __init__(self) -> None:
        super().__init__(MISTRAL_MARKERS)
        self._value: ValueEnd | None = None
        self._index = -1

    def _before_call(self) -> bool:
        text = self._buffer.lstrip(_SPACE)
        if text and text[0] not in "[{":
            self._state = self._name
            return True
        return super()._before_call()

    def _name(self) -> bool:
        text, marker = self._until(("[ARGS]", "{"))
        self._skipped += text
        if not marker:
            return False
        if marker == "{":
            self._buffer = "{" + self._buffer
        header = self._skipped.removeprefix(self._markers.begins[0])
        self._index = self._content.begin_call()
        self._events.append(CallStart(self._index, header.partition("[CALL_ID]")[0].strip()))
        self._skipped, self._value, self._state = "", ValueEnd(), self._arguments
        return True

    def _arguments(self) -> bool:
        assert self._value is not None
        count, text = 0, ""
        while count < len(self._buffer) and not self._value.ended:
            character = self._buffer[count]
            text += character if self._value.accepts(character) else ""
            count += 1
        self._take(count)
        if text:
            self._events.append(CallArguments(self._index, text))
        if self._value.ended:
            self._state = self._in_content
        return self._value.ended
