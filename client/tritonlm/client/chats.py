"""The arguments of a chat beside the sampling parameters: messages, tools, rendering, and how the answer is read.

They are checked here, as far as that needs no model; errors name the argument. `chat_parsing` knows formats. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlm.client.chat_parsing.profile import Answer, ChatProfile
from tritonlm.client.chat_parsing.tools import Tools, read_tools
from tritonlm.contract import InvalidRequest

# Parameters that constrain the text themselves.
_CONSTRAINTS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_FLAGS = ("add_generation_prompt", "continue_final_message", "separate_reasoning")


@dataclass(frozen=True)
class Chat:
    """A chat as the model `tokenize` reads it, and how its answer is to be read."""

    prompt: str
    tools: Tools
    continues: bool
    separate_reasoning: bool
    hides_special_tokens: bool
    # The schema of answers without tool calls.
    content_schema: dict[str, Any] | None

    def answer(self, profile: ChatProfile, rendered: str) -> Answer:
        return profile.answer(
            self.tools,
            rendered,
            separate_reasoning=self.separate_reasoning,
            hides_special_tokens=self.hides_special_tokens,
            content_schema=self.content_schema,
        )


# The arguments of `take_chat`, beside `messages`; all others belong to the plan of the sequences.
CHAT_ARGUMENTS = ("tools", "tool_choice", "parallel_tool_calls", "documents", "chat_template_kwargs", *_FLAGS)


def take_chat(messages: Sequence[Mapping[str, Any]], arguments: dict[str, Any]) -> Chat:
    """Take a chat's own arguments out of all of them."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    sent = {name: arguments.pop(name) for name in CHAT_ARGUMENTS if name in arguments}
    for name in _FLAGS:
        if sent.get(name) is not None and not isinstance(sent[name], bool):
            raise InvalidRequest(f"{name} must be true or false", name)
    tools = read_tools(sent.get("tools"), sent.get("tool_choice"), sent.get("parallel_tool_calls"))
    options = {
        name: sent[name]
        for name in ("documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        if sent.get(name) is not None
    }
    if tools.shown:
        options["tools"] = tools.definitions
    try:
        # A list alone is what a server of an older release reads.
        prompt = json.dumps({"messages": list(messages), **options} if options else list(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages is not valid JSON: {error}", "messages") from None
    return Chat(
        prompt,
        tools,
        bool(sent.get("continue_final_message")),
        sent.get("separate_reasoning") is not False,
        arguments.get("skip_special_tokens") is not False,
        _take_content_schema(tools, arguments),
    )


def _take_content_schema(tools: Tools, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """With tools, the grammar of the calls includes that of the other answers."""
    if not tools.active:
        return None
    for name in _CONSTRAINTS:
        if arguments.get(name) is not None:
            raise InvalidRequest(f"{name} and tools both constrain the answer; send one of them", name)
    response_format = arguments.pop("response_format", None)
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = response_format.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", '
            '"json_schema": {"name": …, "schema": …}}',
            "response_format",
        )
    return dict(schema)


def with_argument_name(error: InvalidRequest) -> InvalidRequest:
    """An error about the grammar of the tools names the tools, whose schemas it comes from."""
    if error.param is None or not error.param.startswith("structured_outputs"):
        return error
    return InvalidRequest(f"the parameters of a tool cannot be enforced: {error.message}", "tools")
