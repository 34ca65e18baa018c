"""Anthropic's messages and their content blocks as the messages of a chat.

Blocks of hosted tools, which no local server has, are left out and named. Consecutive messages of a role are one turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest

Json = dict[str, Any]
_ROLES = ("user", "assistant", "system")
# The fields of each type of block that are read, or that are only marks of an earlier answer; any other is named in the
# warnings. Null means "not sent".
_FIELDS = {
    "text": {"text", "citations"},
    "thinking": {"thinking", "signature"},
    "tool_use": {"id", "name", "input", "caller", "toolset_name"},
    "tool_result": {"tool_use_id", "content", "is_error", "toolset_name"},
    "document": {"source", "title", "context"},
}
# Prefixes are cached by their content.
_OF_ALL = {"type", "cache_control"}


@dataclass
class Conversation:
    messages: list[Json] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # The ids of the tool uses so far; each result must belong to one.
    call_ids: set[str] = field(default_factory=set)

    def warn(self, warning: str) -> None:
        """Once: a long conversation may hold what has no effect many times."""
        if warning not in self.warnings:
            self.warnings.append(warning)

    def note_fields(self, block: Mapping[str, Any]) -> None:
        """Name the fields of a block that have no effect."""
        kind = block["type"]
        for name, value in block.items():
            if value is not None and name not in _FIELDS[kind] | _OF_ALL:
                self.warn(f"{name[:60]} of {kind} blocks has no effect")


def read_conversation(system: str | Sequence[Json] | None, messages: Sequence[Json]) -> Conversation:
    conversation = Conversation()
    if system:
        text = _read_text(conversation, system, "system")
        conversation.messages.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        for name, value in message.items():
            if name not in ("role", "content") and value is not None:
                raise InvalidRequest(f"{where}: unknown field {name[:60]!r}", f"{where}.{name[:60]}")
        if role not in _ROLES:
            raise InvalidRequest(f"{where}.role must be user or assistant; the system message is system", where)
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise InvalidRequest(f"{where}.content must be a string or a list of blocks", f"{where}.content")
        turn = _Turn(conversation, role)
        for position, block in enumerate(content):
            turn.add(block, f"{where}.content[{position}]")
        turn.finish()
    return conversation


class _Turn:
    """One message's blocks. Results of tools are messages of their own, before the text."""

    def __init__(self, conversation: Conversation, role: str) -> None:
        self._conversation, self._role = conversation, role
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []
        self._has_results = False

    def add(self, block: Any, where: str) -> None:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(kind, str) and kind in _FIELDS:
            self._conversation.note_fields(block)
        if kind == "text":
            self._texts.append(_text(block, "text", where))
        elif kind == "thinking" and self._role == "assistant":
            self._reasoning.append(_text(block, "thinking", where))
        elif kind == "redacted_thinking" and self._role == "assistant":
            self._leave_out(kind, where)
        elif kind == "tool_use" and self._role == "assistant":
            self._add_call(block, where)
        elif kind == "tool_result" and self._role == "user":
            self._add_result(block, where)
        elif kind == "document":
            self._texts.append(_document(block, where))
        elif isinstance(kind, str) and (kind == "server_tool_use" or kind.endswith("_tool_result")):
            self._leave_out(kind, where)
        else:
            raise InvalidRequest(
                f"{where}: a block of the type {str(kind)[:60]} is not supported here; send text", where
            )

    def finish(self) -> None:
        text, messages = "\n".join(self._texts), self._conversation.messages
        if self._role == "assistant":
            self._finish_assistant(text)
        elif text or not self._has_results:
            if messages and messages[-1]["role"] == self._role:
                messages[-1]["content"] += f"\n{text}"
            else:
                messages.append({"role": self._role, "content": text})

    def _finish_assistant(self, text: str) -> None:
        messages = self._conversation.messages
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        turn = messages[-1]
        turn["content"] += f"\n{text}" if turn["content"] and text else text
        if self._reasoning:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(self._reasoning)
        if self._calls:
            turn.setdefault("tool_calls", []).extend(self._calls)

    def _add_call(self, block: Mapping[str, Any], where: str) -> None:
        call_id, name, value = _text(block, "id", where), _text(block, "name", where), block.get("input")
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{where}.input must be an object", f"{where}.input")
        arguments = json.dumps(value, ensure_ascii=False)
        self._calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        self._conversation.call_ids.add(call_id)

    def _add_result(self, block: Mapping[str, Any], where: str) -> None:
        call_id = _text(block, "tool_use_id", where)
        if call_id not in self._conversation.call_ids:
            raise InvalidRequest(
                f"{where}.tool_use_id: no tool_use has the id {call_id[:60]!r}", f"{where}.tool_use_id"
            )
        content, failed = block.get("content"), block.get("is_error")
        text = "" if content is None else _read_text(self._conversation, content, f"{where}.content")
        if not isinstance(failed, bool | None):
            raise InvalidRequest(f"{where}.is_error must be true or false", f"{where}.is_error")
        # Chats have no field for a failure.
        text = f"Error: {text}" if failed else text
        self._conversation.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self._has_results = True

    def _leave_out(self, kind: str, where: str) -> None:
        self._conversation.warn(f"{where}: a block of the type {kind[:60]} is left out")


def _read_text(conversation: Conversation, blocks: Any, where: str) -> str:
    """A text, or the text of a list of text blocks and text documents."""
    if isinstance(blocks, str):
        return blocks
    if not isinstance(blocks, list):
        raise InvalidRequest(f"{where} must be a string or a list of text blocks", where)
    texts = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind not in ("text", "document"):
            raise InvalidRequest(f"{place} must be a text block: these models read text only", place)
        conversation.note_fields(block)
        texts.append(_text(block, "text", place) if kind == "text" else _document(block, place))
    return "\n".join(texts)


def _document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    if not isinstance(source, Mapping) or source.get("type") != "text":
        raise InvalidRequest(f"{where}.source must be text: these models read text only", f"{where}.source")
    parts = [_text(block, name, where) for name in ("title", "context") if block.get(name) is not None]
    return "\n".join(filter(None, [*parts, _text(source, "data", f"{where}.source")]))


def _text(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} must be a string", f"{where}.{name}")
    return value
