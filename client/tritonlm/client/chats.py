"""The arguments of a chat beside the sampling parameters: messages, tools, rendering, and how the answer is read.

They are checked here, as far as that needs no model; errors name the argument. `chat_parsing` knows formats. No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlm.client.chat_parsing.profile import Answer, ChatProfile
from tritonlm.client.chat_parsing.tools import Tools, read_tools
from tritonlm.contract import InvalidRequest, TritonLMError
from tritonlm.contract.json_schemas import place_of
from tritonlm.contract.structured_outputs import JSON, JSON_OBJECT, NAME, OTHER_NAMES, with_sent_name
from tritonlm.contract.tool_formats import EFFORT, EFFORTS

# The engine's refusal of a part of a schema, by its name.
_UNSUPPORTED = re.compile(r"(the format )?(.+?) is not supported")
_FLAGS = ("add_generation_prompt", "continue_final_message", "separate_reasoning")


@dataclass(frozen=True)
class Chat:
    """A chat as the model `tokenize` reads it, and how its answer is to be read."""

    prompt: str
    tools: Tools
    continues: bool
    separate_reasoning: bool
    hides_special_tokens: bool
    reasoning_effort: str | None = None

    def check_constraint(self, structured_outputs: Mapping[str, Any], sent: Mapping[str, Any]) -> None:
        """Refuse a constraint that cannot be a part of the grammar of tool calls. `sent`: the caller's arguments."""
        if self.tools.active and structured_outputs and _content_schema(structured_outputs) is None:
            name = next(name for name in (NAME, *OTHER_NAMES) if sent.get(name) is not None)
            raise InvalidRequest(f"{name} and tools both constrain the answer; send one of them", name)

    def warnings(self, profile: ChatProfile) -> list[str]:
        """What of the request was left out, or has no effect."""
        if self.reasoning_effort and not profile.takes_effort(self.reasoning_effort):
            return [*self.tools.warnings, f"{EFFORT} has no effect: this model's chat template has no variable for it"]
        return list(self.tools.warnings)

    def answer(self, profile: ChatProfile, rendered: str, structured_outputs: Mapping[str, Any]) -> Answer:
        return profile.answer(
            self.tools,
            rendered,
            separate_reasoning=self.separate_reasoning,
            hides_special_tokens=self.hides_special_tokens,
            constrained=bool(structured_outputs),
            content_schema=_content_schema(structured_outputs),
        )


def _content_schema(structured_outputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of the content, if the constraint is one."""
    if JSON_OBJECT in structured_outputs:
        return {"type": "object"}
    schema = structured_outputs.get(JSON)
    return schema if isinstance(schema, dict) else None


# The arguments of `take_chat`, beside `messages`; all others belong to the plan of the sequences.
CHAT_ARGUMENTS = (
    "tools", "tool_choice", "parallel_tool_calls", "documents", "chat_template_kwargs", EFFORT, *_FLAGS,
)  # fmt: skip


def prompt_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a chat's arguments that its prompt is rendered from."""
    return {name: arguments[name] for name in ("model", "messages", *CHAT_ARGUMENTS) if name in arguments}


def take_chat(messages: Sequence[Mapping[str, Any]], arguments: dict[str, Any]) -> Chat:
    """Take a chat's own arguments out of all of them."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    sent = {name: arguments.pop(name) for name in CHAT_ARGUMENTS if name in arguments}
    for name in _FLAGS:
        if sent.get(name) is not None and not isinstance(sent[name], bool):
            raise InvalidRequest(f"{name} must be true or false", name)
    effort = sent.get(EFFORT)
    if effort is not None and effort not in EFFORTS:
        raise InvalidRequest(f"{EFFORT} must be one of {', '.join(EFFORTS)}", EFFORT)
    tools = read_tools(sent.get("tools"), sent.get("tool_choice"), sent.get("parallel_tool_calls"))
    options = {
        name: sent[name]
        for name in ("documents", "chat_template_kwargs", EFFORT, "add_generation_prompt", "continue_final_message")
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
        effort,
    )


def with_argument_name(error: InvalidRequest, sent: Mapping[str, Any], tools: Tools) -> InvalidRequest:
    """An error about the answer's grammar names what the caller has sent: a tool, or the format of the answer."""
    if not tools.active or error.param is None or not error.param.startswith(NAME):
        return with_sent_name(error, sent)
    reason = error.message.removeprefix(f"{error.param}: ").removeprefix(f"{error.param} ")
    if match := _UNSUPPORTED.match(reason):
        key, value = ("format", match[2]) if match[1] else (match[2].split(", ")[0], None)
        for function in tools.callable:
            if (place := place_of(function.parameters, key, value)) is not None:
                param = f"{function.path}.parameters"
                return InvalidRequest(f"{param} cannot be enforced: {reason} (at {place})", param)
    return InvalidRequest(f"the parameters of a tool cannot be enforced: {reason}", "tools")


def renamed(error: TritonLMError, names: Mapping[str, str]) -> TritonLMError:
    """The error with the field's name in the caller's API. `names`: the chat's name of a field, and the caller's."""
    param = error.param or ""
    for name, own in names.items():
        if param == name or param.startswith((f"{name}[", f"{name}.")):
            result = type(error)(error.message.replace(name, own), param.replace(name, own, 1))
            result.retry_after, result.headers = error.retry_after, error.headers
            return result
    return error
