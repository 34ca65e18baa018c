"""Reads a caller's chat: messages, tools and the options of its rendering. Everything that is not supported is refused.

It knows the schema of chats, and neither templates nor tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest
from tritonlm.contract.tool_formats import EFFORT, EFFORTS

Message = dict[str, Any]

PARAM = "messages"
_CHAT_FIELDS = (
    "messages", "tools", "documents", "chat_template_kwargs", EFFORT, "add_generation_prompt", "continue_final_message",
)  # fmt: skip
# The fields beside role and content, and the role that may have them.
_FIELDS_OF_ROLE = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool", "name": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
MAX_KWARGS, MAX_KWARGS_CHARACTERS = 32, 16_384
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    # Unlike `template_kwargs`, a template may lack its variables.
    reasoning_effort: str | None = None


def read_chat(text: str) -> Chat:
    """Parse a caller's JSON: a list of messages, or an object with it and with tools, documents and options."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages is not valid JSON: {error}", PARAM) from error
    fields = value if isinstance(value, dict) and "messages" in value else {"messages": value}
    for name in fields:
        if name not in _CHAT_FIELDS:
            raise InvalidRequest(f"a chat has no field {name[:60]!r}; it has {', '.join(_CHAT_FIELDS)}", name[:64])
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a JSON list of at least one {role, content}", PARAM)
    read = _with_names([_read_message(f"messages[{index}]", message) for index, message in enumerate(messages)])
    continued = _flag(fields, "continue_final_message", default=False)
    generation_prompt = _flag(fields, "add_generation_prompt", default=not continued)
    if continued and generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other; send one", "add_generation_prompt"
        )
    if continued and (read[-1]["role"] != "assistant" or "tool_calls" in read[-1]):
        raise InvalidRequest(
            "continue_final_message needs a last message of the role assistant with text", "continue_final_message"
        )
    return Chat(
        read,
        _objects(fields, "tools") or None,
        _objects(fields, "documents") or None,
        _kwargs(fields.get("chat_template_kwargs")),
        generation_prompt,
        continued,
        _effort(fields.get(EFFORT)),
    )


def _effort(value: Any) -> str | None:
    if value is None:
        return None
    if value not in EFFORTS:
        raise InvalidRequest(f"{EFFORT} must be one of {', '.join(EFFORTS)}", EFFORT)
    return str(value)


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", name)
    return default if value is None else value


def _objects(fields: Mapping[str, Any], name: str) -> list[Any]:
    values = fields.get(name)
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InvalidRequest(f"{name} must be a list of objects", name)
    return values


def _kwargs(values: Any) -> dict[str, Any]:
    name = "chat_template_kwargs"
    if values is None:
        return {}
    valid = isinstance(values, dict) and len(values) <= MAX_KWARGS and all(map(_NAME.fullmatch, values))
    if not valid or len(json.dumps(values)) > MAX_KWARGS_CHARACTERS:
        raise InvalidRequest(
            f"{name} must be an object of at most {MAX_KWARGS} variables and {MAX_KWARGS_CHARACTERS:,} characters", name
        )
    for key in values:
        # The effort is a field of the chat, and a template's variable.
        if key in {*_CHAT_FIELDS, "raise_exception", "strftime_now"} - {EFFORT}:
            raise InvalidRequest(f"{name}.{key} is set by the server; leave it out", f"{name}.{key}")
    return dict(values)


def _read_message(name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{name} must be an object with role and content", name)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{name}.role must be a string such as user, assistant or system", f"{name}.role")
    # Clients echo an assistant's message with the lists that are empty.
    empty: tuple[Any, ...] = (None, []) if role == "assistant" else (None,)
    sent = {field: value for field, value in message.items() if value not in empty}
    for field_name in sent:
        if field_name not in ("role", "content") and _FIELDS_OF_ROLE.get(field_name) != role:
            known = [key for key, owner in _FIELDS_OF_ROLE.items() if owner == role]
            raise InvalidRequest(
                f"{name} has the field {field_name[:60]!r}, which is not supported; send "
                f"{', '.join(['role', 'content', *known])} only",
                name,
            )
    read: Message = {"role": role}
    if "tool_calls" in sent:
        read["content"] = _read_content(f"{name}.content", sent["content"]) if sent.get("content") else ""
        read["tool_calls"] = list(_read_calls(f"{name}.tool_calls", sent["tool_calls"]))
    else:
        read["content"] = _read_content(f"{name}.content", message.get("content"))
    for field_name in ("reasoning_content", "tool_call_id", "name"):
        if field_name in sent:
            if not isinstance(sent[field_name], str):
                raise InvalidRequest(f"{name}.{field_name} must be a string", f"{name}.{field_name}")
            read[field_name] = sent[field_name]
    return read


def _read_calls(name: str, calls: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{name} must be a list of tool calls", name)
    for index, call in enumerate(calls):
        where = f"{name}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(
                f'{where} must be {{"id": "…", "type": "function", "function": {{"name": "…", "arguments": "…"}}}}',
                where,
            )
        call_id = call.get("id")
        if call_id is not None and not isinstance(call_id, str):
            raise InvalidRequest(f"{where}.id must be a string", f"{where}.id")
        arguments = _read_arguments(f"{where}.function.arguments", function.get("arguments"))
        yield {
            **({} if call_id is None else {"id": call_id}),
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }


def _read_arguments(name: str, arguments: Any) -> dict[str, Any]:
    """Templates take an object; OpenAI's API has it as a JSON string."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not valid JSON: {error}", name) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be a JSON object, as a string", name)
    return value


def _with_names(messages: list[Message]) -> list[Message]:
    """Give the results of tools the name of their function, which some templates write."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def _read_content(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f'{name} must be a string or a list of {{"type": "text", "text": "…"}}', name)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            where = f"{name}[{index}]"
            raise InvalidRequest(f'{where} must be {{"type": "text", "text": "…"}}: only text is supported', where)
        texts.append(text)
    return "\n".join(texts)
