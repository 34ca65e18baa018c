"""A chat's chunks as output items and as the events of a stream, in the order of OpenAI's library.

One item is open at a time. It knows the format only; `writer` wraps the items into a response.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from .items import CUSTOM_INPUT

Emit = Callable[..., None]
Json = dict[str, Any]
IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"
# The prefix of an item's id, its type, and the field with its arguments.
_FUNCTION = ("fc", "function_call", "arguments")
_CUSTOM = ("ctc", "custom_tool_call", "input")


class OutputItems:
    def __init__(self, emit: Emit, custom_tools: frozenset[str] = frozenset()) -> None:
        """`emit(type, **fields)` takes the events."""
        self.items: list[Json] = []
        self._emit, self._custom_tools = emit, custom_tools
        self._open: _TextItem | _CallItem | None = None
        # The index of the open tool call among the chat's calls.
        self._call_index: int | None = None

    def add_reasoning(self, delta: str) -> None:
        self._text_item("reasoning").add(delta, [])

    def add_text(self, delta: str, logprobs: Sequence[Json] = ()) -> None:
        self._text_item("message").add(delta, logprobs)

    def add_call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> None:
        """A part of the chat's tool call of this index; its first part has the id and the name."""
        if not isinstance(self._open, _CallItem) or index != self._call_index:
            self._close(COMPLETED)
            assert name, "a tool call begins with its name"
            call_id = call_id or f"call_{secrets.token_hex(12)}"
            self._open, self._call_index = _CallItem(self._begin, name, call_id, name in self._custom_tools), index
        self._open.add(arguments)

    def finish(self, status: str) -> None:
        """Close the open item. An answer without any item gets an empty message."""
        if not self.items:
            self._text_item("message")
        self._close(status)

    def _text_item(self, kind: str) -> _TextItem:
        if not isinstance(self._open, _TextItem) or self._open.kind != kind:
            self._close(COMPLETED)
            self._open = _TextItem(self._begin, kind)
        return self._open

    def _begin(self, item: Json) -> Emit:
        """Add an item; returns a function that emits its events."""
        index = len(self.items)
        self.items.append(item)
        self._emit("response.output_item.added", output_index=index, item=item)

        def emit(kind: str, **fields: Any) -> None:
            named = {} if kind == "response.output_item.done" else {"item_id": item["id"]}
            self._emit(kind, output_index=index, **named, **fields)

        return emit

    def _close(self, status: str) -> None:
        if self._open is not None:
            self._open.close(status)
            self._open = None


class _TextItem:
    """A message or reasoning, with one part of text."""

    def __init__(self, begin: Callable[[Json], Emit], kind: str) -> None:
        self.kind = kind
        self._name = "output_text" if kind == "message" else "reasoning_text"
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._item: Json = {"type": kind, "status": IN_PROGRESS, "content": []}
        if kind == "message":
            self._item |= {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
        else:
            self._item |= {"id": f"rs_{secrets.token_hex(12)}", "summary": [], "encrypted_content": None}
        self._emit = begin(self._item)
        self._emit("response.content_part.added", content_index=0, part=self._part())

    def add(self, delta: str, logprobs: Sequence[Json]) -> None:
        if not delta and not logprobs:
            return
        self._texts.append(delta)
        self._logprobs += logprobs
        extra = {"logprobs": list(logprobs)} if self.kind == "message" else {}
        self._emit(f"response.{self._name}.delta", content_index=0, delta=delta, **extra)

    def close(self, status: str) -> None:
        part = self._part()
        self._item |= {"content": [part], "status": status}
        extra = {"logprobs": self._logprobs} if self.kind == "message" else {}
        self._emit(f"response.{self._name}.done", content_index=0, text=part["text"], **extra)
        self._emit("response.content_part.done", content_index=0, part=part)
        self._emit("response.output_item.done", item=self._item)

    def _part(self) -> Json:
        part: Json = {"type": self._name, "text": "".join(self._texts)}
        return {**part, "annotations": [], "logprobs": self._logprobs} if self.kind == "message" else part


class _CallItem:
    """A function call, or the call of a custom tool, whose input is known at its end."""

    def __init__(self, begin: Callable[[Json], Emit], name: str, call_id: str, is_custom: bool) -> None:
        self._custom = is_custom
        self._parts: list[str] = []
        prefix, kind, field = _CUSTOM if is_custom else _FUNCTION
        self._item: Json = {
            "type": kind, "id": f"{prefix}_{secrets.token_hex(12)}", "call_id": call_id, "name": name, field: "",
            "status": IN_PROGRESS,
        }  # fmt: skip
        self._emit = begin(self._item)

    def add(self, arguments: str) -> None:
        self._parts.append(arguments)
        if arguments and not self._custom:
            self._emit("response.function_call_arguments.delta", delta=arguments)

    def close(self, status: str) -> None:
        arguments = "".join(self._parts)
        self._item["status"] = status
        if self._custom:
            text = self._item["input"] = _custom_input(arguments)
            self._emit("response.custom_tool_call_input.delta", delta=text)
            self._emit("response.custom_tool_call_input.done", input=text)
        else:
            self._item["arguments"] = arguments
            name = self._item["name"]
            self._emit("response.function_call_arguments.done", arguments=arguments, name=name)
        self._emit("response.output_item.done", item=self._item)


def _custom_input(arguments: str) -> str:
    """The text inside the arguments; the arguments themselves if they were cut off."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(arguments)[CUSTOM_INPUT]
        if isinstance(text, str):
            return text
    return arguments
