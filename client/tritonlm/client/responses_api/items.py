"""Input items as the messages of a chat. Items of hosted tools, which no local server has, are left out and named.

An assistant's turn may be several items (reasoning, text, function calls); it becomes one message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest

Item = dict[str, Any]
ChatMessage = dict[str, Any]
CALLS, OUTPUTS = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
# Calls of hosted tools and their results, as an earlier answer of another server may hold them.
_HOSTED_ITEMS = (
    "web_search_call", "file_search_call", "computer_call", "computer_call_output", "code_interpreter_call",
    "image_generation_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response",
    "mcp_call", "tool_search_call", "tool_search_output", "program", "program_output", "additional_tools",
)  # fmt: skip
# The one argument of a function that stands for a custom tool.
CUSTOM_INPUT = "input"


@dataclass
class Conversation:
    messages: list[ChatMessage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # The ids of the function calls so far; each output must belong to one.
    call_ids: set[str] = field(default_factory=set)


def as_items(value: str | Sequence[Item]) -> list[Item]:
    """The field `input` as a list of items."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return list(value)


def read_conversation(instructions: str | None, items: Sequence[Item], history: int = 0) -> Conversation:
    """The messages of a chat. The first `history` items come from stored responses, the others from the request."""
    conversation = Conversation()
    if instructions:
        conversation.messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(items):
        where = f"input[{index - history}]" if index >= history else "previous_response_id"
        _add(conversation, item, where)
    if not conversation.messages:
        raise InvalidRequest("input must hold at least one message", "input")
    return conversation


def _add(conversation: Conversation, item: Any, where: str) -> None:
    if not isinstance(item, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    kind = item.get("type") or "message"
    if kind == "message":
        _add_message(conversation, item, where)
    elif kind == "reasoning":
        _add_reasoning(conversation, item, where)
    elif kind in CALLS:
        _add_call(conversation, item, where)
    elif kind in OUTPUTS:
        _add_output(conversation, item, where)
    elif kind in _HOSTED_ITEMS:
        conversation.warnings.append(f"{where}: an item of the type {kind} is left out; no such tool is here")
    elif kind == "item_reference":
        raise InvalidRequest(f"{where}: item_reference is not supported; send the item itself", f"{where}.type")
    else:
        raise InvalidRequest(f"{where}.type {str(kind)[:60]!r} is unknown", f"{where}.type")


def _add_message(conversation: Conversation, item: Mapping[str, Any], where: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
    text = read_text(item.get("content"), f"{where}.content")
    messages = conversation.messages
    if role == "assistant":
        turn = _open_turn(messages)
        if turn["content"] or turn.get("tool_calls"):
            messages.append(turn := {"role": "assistant", "content": ""})
        turn["content"] = text
        return
    # Templates know the role system only, and most of them only once, at the beginning.
    role = "system" if role == "developer" else role
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{text}"
        return
    messages.append({"role": role, "content": text})


def _open_turn(messages: list[ChatMessage]) -> ChatMessage:
    """The assistant's message at the end, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _add_reasoning(conversation: Conversation, item: Mapping[str, Any], where: str) -> None:
    """Reasoning that its server encrypted, or that is empty, adds nothing."""
    parts = item.get("content") or []
    if not isinstance(parts, list):
        raise InvalidRequest(f"{where}.content must be a list", f"{where}.content")
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    text = "".join(part for part in texts if isinstance(part, str))
    if text:
        turn = _open_turn(conversation.messages)
        if turn["content"] or turn.get("tool_calls"):
            conversation.messages.append(turn := {"role": "assistant", "content": ""})
        turn["reasoning_content"] = text


def _add_call(conversation: Conversation, item: Mapping[str, Any], where: str) -> None:
    call_id, name = _text_field(item, "call_id", where), _text_field(item, "name", where)
    if item["type"] == "function_call":
        arguments = _text_field(item, "arguments", where)
        _check_arguments(arguments, f"{where}.arguments")
    else:
        arguments = custom_arguments(_text_field(item, "input", where))
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    _open_turn(conversation.messages).setdefault("tool_calls", []).append(call)
    conversation.call_ids.add(call_id)


def _check_arguments(text: str, where: str) -> None:
    """As templates need it: an error about the chat's messages would name a place that the caller has not sent."""
    try:
        is_object = isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InvalidRequest(f"{where} must be a JSON object, as a string", where)


def _add_output(conversation: Conversation, item: Mapping[str, Any], where: str) -> None:
    call_id = _text_field(item, "call_id", where)
    if call_id not in conversation.call_ids:
        raise InvalidRequest(f"{where}.call_id: no call has the id {call_id[:60]!r}", f"{where}.call_id")
    text = read_text(item.get("output"), f"{where}.output")
    conversation.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})


def custom_arguments(text: str) -> str:
    """The arguments of the function that stands for a custom tool, whose input is a text."""
    return json.dumps({CUSTOM_INPUT: text}, ensure_ascii=False)


def read_text(content: Any, where: str) -> str:
    """A string, or the text of a list of parts. Images, files and audio are refused."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of parts", where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{where}[{index}] must be a part with text ({', '.join(_TEXT_PARTS)}): these models read text only",
                f"{where}[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _text_field(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} must be a string", f"{where}.{name}")
    return value
