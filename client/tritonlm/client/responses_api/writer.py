"""Writes one response: from a whole chat, or from its chunks as numbered events. All of them are plain objects."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tritonlm.client.chats import renamed
from tritonlm.client.types import ChatCompletion, ChatCompletionChunk, CompletionUsage
from tritonlm.contract import TritonLMError

from .logprobs import TextLogprobs
from .output import COMPLETED, IN_PROGRESS, INCOMPLETE, Json, OutputItems
from .request import NAMES, ChatCall

_ECHOED: Json = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None, "reasoning": {},
    "safety_identifier": None, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "tools": [], "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "user": None,
}  # fmt: skip
_FAILED = "failed"


class ResponseWriter:
    def __init__(self, sent: Mapping[str, Any], call: ChatCall, is_stored: bool) -> None:
        self._events: list[Json] = []
        self._sequence_number = 0
        self._items = OutputItems(self._emit, call.custom_tools)
        self._text_logprobs = TextLogprobs()
        self._is_cut = False
        self.response: Json = {
            "id": f"resp_{secrets.token_hex(24)}", "object": "response", "created_at": int(time.time()),
            "status": IN_PROGRESS, "model": sent["model"], "output": self._items.items, "background": False,
            "error": None, "incomplete_details": None, "usage": None, "service_tier": "default", "store": is_stored,
            **{name: sent.get(name, default) for name, default in _ECHOED.items()}, "warnings": call.warnings,
        }  # fmt: skip

    def begin(self) -> list[Json]:
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)
        return self._take()

    def chunk(self, chunk: ChatCompletionChunk) -> list[Json]:
        for choice in chunk.choices:
            entries = _logprobs(choice.logprobs.content if choice.logprobs else ())
            self._add(choice.delta, entries)
            self._is_cut = choice.finish_reason == "length"
        return self._take()

    def end(self, usage: CompletionUsage | None) -> list[Json]:
        self._finish(usage)
        self._emit(f"response.{self.response['status']}", response=self.response)
        return self._take()

    def failure(self, error: Exception, body: Mapping[str, Any]) -> list[Json]:
        """The end of a stream that fails: the response with its error. `body`: the error in OpenAI's form."""
        details = body["error"]
        if isinstance(error, TritonLMError):
            details = {**details, "param": renamed(error, NAMES).param}
        kind = "rate_limit_exceeded" if details["type"] == "rate_limit_exceeded" else "server_error"
        self._items.finish(INCOMPLETE)
        self.response |= {"status": _FAILED, "error": {**details, "code": kind}}
        self._emit("response.failed", response=self.response)
        return self._take()

    def whole(self, chat: ChatCompletion) -> Json:
        """The response of a chat that was not streamed."""
        choice = chat.choices[0]
        self._add(choice.message, _logprobs(choice.logprobs.content if choice.logprobs else ()))
        self._is_cut = choice.finish_reason == "length"
        self._finish(chat.usage)
        self._events.clear()
        return self.response

    def _add(self, message: Any, entries: list[Json]) -> None:
        """A chat's message or the delta of one: reasoning, text, tool calls. `entries`: its log-probabilities."""
        logprobs = self._text_logprobs.take(message, entries)
        if reasoning := getattr(message, "reasoning_content", None):
            self._items.add_reasoning(reasoning)
        if message.content or (logprobs and message.content is not None):
            self._items.add_text(message.content, logprobs)
        for index, call in enumerate(getattr(message, "tool_calls", None) or ()):
            function, position = call.function, getattr(call, "index", None)
            self._items.add_call(
                index if position is None else position, call.id, function.name, function.arguments or ""
            )

    def _finish(self, usage: CompletionUsage | None) -> None:
        status = INCOMPLETE if self._is_cut else COMPLETED
        self._items.finish(status)
        self.response["status"] = status
        if self._is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        if usage is not None:
            self.response["usage"] = usage_of(usage)

    def _emit(self, kind: str, **fields: Any) -> None:
        # A copy: what is written now changes until the end.
        self._events.append({"type": kind, "sequence_number": self._sequence_number, **copy.deepcopy(fields)})
        self._sequence_number += 1

    def _take(self) -> list[Json]:
        events, self._events = self._events, []
        return events


def usage_of(usage: CompletionUsage) -> Json:
    details = getattr(usage, "completion_tokens_details", None)
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        # The rest of the prompt is computed, and its full blocks are kept.
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": usage.prompt_tokens - cached},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": getattr(details, "reasoning_tokens", None) or 0},
        "total_tokens": usage.total_tokens,
    }


def _logprobs(entries: Iterable[Any]) -> list[Json]:
    return [entry.to_dict() for entry in entries]
