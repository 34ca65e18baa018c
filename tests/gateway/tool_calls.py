"""The tool of the gateway's tests, a call of it as a model writes it, and the chat that a request sent."""

from __future__ import annotations

import json
from typing import Any

from fakes.fake_transport import ABOUT_LM

from .conftest import Gateway

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "the weather", "parameters": SCHEMA}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
# As a stream brings it: markers and arguments are cut.
PARTS = [
    "I look. ",
    "\n<tool",
    '_call>\n{"name": "wea',
    'ther", "arguments": {"ci',
    'ty": "Par',
    'is"}}\n</tool_',
    "call>",
]


def use(gateway: Gateway, template: str, **about: Any) -> None:
    """Serve a language model with this chat template."""
    gateway.transport.about = {**ABOUT_LM, "chat_template": template, **about}


def sent_chat(gateway: Gateway) -> Any:
    return json.loads(gateway.transport.calls[-1].prompt.messages or "")
