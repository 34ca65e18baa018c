"""Writes one message of the Messages API: from a whole chat, or from its chunks as events, which are plain objects.

One block is open at a time.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from tritonlm.client.types import ChatCompletion, ChatCompletionChunk, CompletionUsage

from .request import ChatCall

Json = dict[str, Any]
# A block's field with its text, and the type of its deltas and their field.
_DELTAS = {
    "text": ("text", "text_delta", "text"),
    "thinking": ("thinking", "thinking_delta", "thinking"),
    "tool_use": ("input", "input_json_delta", "partial_json"),
}


class MessageWriter:
    def __init__(self, model: str, call: ChatCall) -> None:
        self._events: list[Json] = []
        self._parts: list[str] = []
        # The index of the open tool use among the chat's calls; None while another block is open.
        self._call_index: int | None = None
        self._is_open = False
        self.message: Json = {
            "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage_of(None), "warnings": call.warnings,
        }  # fmt: skip

    def begin(self, usage: CompletionUsage | None) -> list[Json]:
        self._emit("message_start", message={**self.message, "usage": usage_of(usage)})
        self._emit("ping")
        return self._take()

    def chunk(self, chunk: ChatCompletionChunk) -> list[Json]:
        for choice in chunk.choices:
            self._add(choice.delta, choice)
        return self._take()

    def end(self, usage: CompletionUsage | None) -> list[Json]:
        self._finish(usage)
        delta = {name: self.message[name] for name in ("stop_reason", "stop_sequence")}
        self._emit("message_delta", delta=delta, usage=self.message["usage"])
        self._emit("message_stop")
        return self._take()

    def failure(self, body: Mapping[str, Any]) -> list[Json]:
        """`body`: the error in Anthropic's form."""
        self._emit("error", error=body["error"])
        return self._take()

    def whole(self, chat: ChatCompletion) -> Json:
        """The message of a chat that was not streamed."""
        choice = chat.choices[0]
        self._add(choice.message, choice)
        self._finish(chat.usage)
        self._events.clear()
        return self.message

    def _add(self, message: Any, choice: Any) -> None:
        """A chat's message or the delta of one: reasoning, text, tool calls, and the reason of the end."""
        if reasoning := getattr(message, "reasoning_content", None):
            self._open("thinking", {"thinking": "", "signature": ""})
            self._delta(reasoning)
        if message.content:
            self._open("text", {"text": "", "citations": None})
            self._delta(message.content)
        for number, call in enumerate(getattr(message, "tool_calls", None) or ()):
            position = getattr(call, "index", None)
            self._add_call(number if position is None else position, call)
        if choice.finish_reason == "length":
            self.message["stop_reason"] = "max_tokens"
        elif choice.finish_reason and (stop := getattr(choice, "stop_reason", None)):
            self.message |= {"stop_reason": "stop_sequence", "stop_sequence": stop}

    def _add_call(self, index: int, call: Any) -> None:
        if index != self._call_index:
            self._close()
            call_id = call.id or f"toolu_{secrets.token_hex(12)}"
            self._start({"type": "tool_use", "id": call_id, "name": call.function.name, "input": {}})
            self._call_index = index
        self._delta(call.function.arguments or "")

    def _open(self, kind: str, fields: Json) -> None:
        if not self._is_open or self.message["content"][-1]["type"] != kind:
            self._close()
            self._start({"type": kind, **fields})

    def _start(self, block: Json) -> None:
        self.message["content"].append(block)
        self._is_open, self._parts, self._call_index = True, [], None
        self._emit("content_block_start", index=len(self.message["content"]) - 1, content_block=block)

    def _delta(self, text: str) -> None:
        if text:
            block = self.message["content"][-1]
            _, kind, name = _DELTAS[block["type"]]
            self._parts.append(text)
            index = len(self.message["content"]) - 1
            self._emit("content_block_delta", index=index, delta={"type": kind, name: text})

    def _close(self) -> None:
        if not self._is_open:
            return
        block, text = self.message["content"][-1], "".join(self._parts)
        block[_DELTAS[block["type"]][0]] = _input(text) if block["type"] == "tool_use" else text
        self._is_open = False
        self._emit("content_block_stop", index=len(self.message["content"]) - 1)

    def _finish(self, usage: CompletionUsage | None) -> None:
        self._close()
        if self.message["stop_reason"] is None:
            has_calls = any(block["type"] == "tool_use" for block in self.message["content"])
            self.message["stop_reason"] = "tool_use" if has_calls else "end_turn"
        self.message["usage"] = usage_of(usage)

    def _emit(self, kind: str, **fields: Any) -> None:
        # A copy: what is written now changes until the end.
        self._events.append({"type": kind, **copy.deepcopy(fields)})

    def _take(self) -> list[Json]:
        events, self._events = self._events, []
        return events


def _input(arguments: str) -> Any:
    """A tool's input. Arguments that were cut off are read as far as they go."""
    with contextlib.suppress(ValueError):
        value = from_json(arguments or "{}", allow_partial=True)
        if isinstance(value, dict):
            return value
    return {}


def usage_of(usage: CompletionUsage | None) -> Json:
    """Anthropic's `input_tokens` are those that were not found in the cache."""
    prompt = usage.prompt_tokens if usage else 0
    cached = usage.prompt_tokens_details.cached_tokens if usage else 0
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens if usage else 0,
    }
