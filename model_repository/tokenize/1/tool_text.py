"""Tools for chat templates that know none: a system text that lists them, and calls and results as text.

It knows messages; the format of the calls is `hermes`, which small models have seen most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .messages import Message

_INSTRUCTIONS = """You may call functions to help with the user's request. Each line describes one:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON within these tags, one pair of tags for each call:
<tool_call>
{{"name": "function name", "arguments": {{"parameter": "value"}}}}
</tool_call>"""


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[Message]:
    """The same chat for a template that knows only texts of system, user and assistant."""
    written = _write_calls(messages)
    if not tools:
        return written
    text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if written[0]["role"] == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{text}"}, *written[1:]]
    return [{"role": "system", "content": text}, *written]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same chat for a template that refuses system messages: the text begins the first message after it."""
    first, second, *rest = messages
    return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]


def _write_calls(messages: Sequence[Message]) -> list[Message]:
    written: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1].get("results"):
                # Many templates demand that user and assistant alternate.
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result, "results": True})
            continue
        calls = [
            f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
            for call in message.get("tool_calls", ())
        ]
        content = "\n".join(filter(None, [message["content"], *calls]))
        written.append({"role": message["role"], "content": content})
    return [{name: value for name, value in message.items() if name != "results"} for message in written]
