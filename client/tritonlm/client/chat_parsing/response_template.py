"""Parses answers by the `response_template` that a checkpoint declares, with transformers' own parser.

That parser needs no torch. Where transformers is not installed, the client recognizes the format by the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Event, Reasoning
from tritonlm.client.chat_parsing.scanning import ContentWriter, Scanner, as_arguments
from tritonlm.contract import CheckpointError

_REASONING_FIELDS = ("thinking", "reasoning", "reasoning_content")


def is_installed() -> bool:
    """Whether transformers' parser can be imported; the first call takes half a second."""
    try:
        import transformers.utils.chat_parsing  # noqa: F401, PLC0415 (only checkpoints that declare one need it)
    except ImportError:
        return False
    return True


class ResponseTemplateParser(Scanner):
    def __init__(self, template: dict[str, Any], prompt: str, tools: Sequence[dict[str, Any]]) -> None:
        """`prompt`: the rendered chat, which may begin a part of the answer."""
        super().__init__()
        from transformers.utils.chat_parsing import ResponseParser  # noqa: PLC0415

        try:
            self._parser = ResponseParser(template, prefix=prompt, tools=list(tools) or None)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"this checkpoint's response_template is broken: {str(error)[:200]}") from None
        self._content = ContentWriter(self)
        # The text of a region whose value is only known at its end.
        self._pending = ""
        self._failed = False

    def _step(self) -> bool:
        # One by one: the events of a feed that fails are lost.
        text = self._take(1)
        if self._failed:
            self._content.write(text)
        elif text:
            self._read(lambda: self._parser.feed(text))
        return bool(self._buffer)

    def _finish(self) -> None:
        if not self._failed:
            self._read(lambda: self._parser.finalize()[1])
        self._content.end()

    def _read(self, advance: Any) -> None:
        try:
            found = advance()
        except (ValueError, KeyError, TypeError):
            # What is no valid region stays content.
            self._failed = True
            self._content.write(self._pending)
            self._pending = ""
            return
        for event in found:
            self._emit(event)

    def _emit(self, event: dict[str, Any]) -> None:
        field, text = event["field"], event.get("text", "")
        if event["type"] == "region_chunk":
            if event["dirty"]:
                self._pending += text
            elif field in _REASONING_FIELDS:
                self._events.append(Reasoning(text))
            elif field != "role":
                self._content.write(text)
        elif event["type"] == "region_close" and self._pending:
            self._pending = ""
            self._events += self._calls(event["value"])

    def _calls(self, value: Any) -> list[Event]:
        events: list[Event] = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            if not isinstance(function.get("name"), str):
                continue
            arguments = function.get("arguments", {})
            index = self._content.begin_call()
            text = arguments if isinstance(arguments, str) else as_arguments(arguments)
            events += [CallStart(index, function["name"]), CallArguments(index, text)]
        return events
