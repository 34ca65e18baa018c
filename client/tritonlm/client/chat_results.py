"""Builds OpenAI's chat completions from a call's pieces, complete or chunk by chunk. No I/O here.

A parser of `chat_parsing` reads each sequence's text, if the chat has tools or the checkpoint reasons.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable, Sequence
from typing import Any

from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Content, Event, Parser, Reasoning, joined
from tritonlm.client.chat_parsing.profile import Answer
from tritonlm.client.results import SequenceBuilder, finish_reason_of
from tritonlm.client.sequences import Plan
from tritonlm.client.types import (
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    FunctionDelta,
    Logprob,
    Piece,
    ToolCall,
    ToolCallDelta,
)

_CHAT, _CHAT_CHUNK = "chat.completion", "chat.completion.chunk"
_LETTERS = string.ascii_letters + string.digits


class ChatBuilder(SequenceBuilder):
    def __init__(self, plan: Plan, answer: Answer | None = None, warnings: Sequence[str] = ()) -> None:
        """`warnings`: what of the request was left out."""
        super().__init__(plan)
        self._answer = answer or Answer()
        self._readers: dict[int, _Reader] = {}
        self.warnings = tuple(warnings)
        self._warned = False

    def chunk(self, sequence: int, piece: Piece) -> ChatCompletionChunk | None:
        """None: there is nothing to show yet, because the text may be part of a marker."""
        self._record(sequence, piece)
        delta, reason = self._delta(sequence, piece), self._reason(sequence, piece)
        if piece.index == 0:
            delta = {"role": "assistant", **delta}
        logprobs, extras = self._logprobs(piece.logprobs), self._extras([piece])
        if not delta and reason is None and logprobs is None and not extras:
            return None
        choice = ChatChunkChoice.model_construct(
            index=sequence,
            delta=ChatDelta.model_construct(**delta),
            logprobs=logprobs,
            finish_reason=reason,
            **extras,
        )
        warnings = self._take_warnings()
        return ChatCompletionChunk.model_construct(
            **self._common(_CHAT_CHUNK), choices=[choice], **self._null_usage(), **warnings
        )

    def _take_warnings(self) -> dict[str, Any]:
        if self._warned or not self.warnings:
            return {}
        self._warned = True
        return {"warnings": list(self.warnings)}

    def _delta(self, sequence: int, piece: Piece) -> dict[str, Any]:
        if self._answer.make_parser is None:
            return {"content": piece.text}
        return _delta_of(self._reader(sequence).read(piece))

    def _reader(self, sequence: int) -> _Reader:
        if sequence not in self._readers:
            assert self._answer.make_parser is not None
            self._readers[sequence] = _Reader(self._answer.make_parser(), self._answer.short_ids)
        return self._readers[sequence]

    def _reason(self, sequence: int, piece: Piece) -> ChatFinishReason | None:
        reason = finish_reason_of(piece)
        if reason == "stop" and sequence in self._readers and self._readers[sequence].ends_with_whole_calls():
            return "tool_calls"
        return reason

    def usage_chunk(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._common(_CHAT_CHUNK), choices=[], usage=self.usage)

    def build(self, sequences: Sequence[Sequence[Piece]]) -> ChatCompletion:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(sequences)]
        return ChatCompletion(**self._common(_CHAT), choices=choices, usage=self.usage, **self._take_warnings())

    def _choice(self, sequence: int, pieces: Sequence[Piece]) -> ChatChoice:
        for piece in pieces:
            self._record(sequence, piece)
        entries = [entry for piece in pieces for entry in piece.logprobs or []]
        message: dict[str, Any] = {"content": "".join(piece.text for piece in pieces)}
        if self._answer.make_parser is not None:
            reader = self._reader(sequence)
            message = _message_of(event for piece in pieces for event in reader.read(piece))
        return ChatChoice(
            index=sequence,
            message=ChatMessage(role="assistant", refusal=None, **message),
            logprobs=self._logprobs(entries),
            finish_reason=self._reason(sequence, pieces[-1]),
            **self._extras(pieces),
        )

    def _logprobs(self, entries: Sequence[Logprob] | None) -> ChatLogprobs | None:
        if entries is None or not self.plan.show_logprobs:
            return None
        return ChatLogprobs.model_construct(content=[_chat_entry(entry) for entry in entries])


class _Call:
    """A call's begin with the id that it gets."""

    def __init__(self, start: CallStart, short: bool) -> None:
        self.start = start
        self.id = "".join(secrets.choice(_LETTERS) for _ in range(9)) if short else f"call_{secrets.token_hex(12)}"


class _Reader:
    """Reads one sequence's pieces."""

    def __init__(self, parser: Parser, short_ids: bool) -> None:
        self._parser, self._short_ids = parser, short_ids
        # Of the last call; without calls it stays empty, which is no JSON.
        self._arguments: list[str] = []

    def ends_with_whole_calls(self) -> bool:
        """A stop string of the caller may have cut the last one."""
        try:
            json.loads("".join(self._arguments))
        except (ValueError, RecursionError):
            return False
        return True

    def read(self, piece: Piece) -> list[Event | _Call]:
        events = self._parser.feed(piece.text)
        if piece.finish_reason:
            events += self._parser.flush()
        read: list[Event | _Call] = []
        for event in joined(events):
            if isinstance(event, CallStart):
                self._arguments = []
            elif isinstance(event, CallArguments):
                self._arguments.append(event.text)
            read.append(_Call(event, self._short_ids) if isinstance(event, CallStart) else event)
        return read


def _delta_of(events: Iterable[Event | _Call]) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    calls: list[ToolCallDelta] = []
    for event in events:
        if isinstance(event, Content):
            delta["content"] = delta.get("content", "") + event.text
        elif isinstance(event, Reasoning):
            delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
        elif isinstance(event, _Call):
            function = FunctionDelta(name=event.start.name, arguments="")
            calls.append(ToolCallDelta(index=event.start.index, id=event.id, type="function", function=function))
        elif isinstance(event, CallArguments):
            calls.append(ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text)))
    if calls:
        delta["tool_calls"] = _merged(calls)
    return delta


def _merged(calls: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """One entry for each call: readers expect an index once in a delta."""
    by_index: dict[int, ToolCallDelta] = {}
    for call in calls:
        first = by_index.get(call.index)
        if first is None:
            by_index[call.index] = call
            continue
        function = first.function.model_copy(update={"arguments": first.function.arguments + call.function.arguments})
        by_index[call.index] = first.model_copy(update={"function": function})
    return list(by_index.values())


def _message_of(events: Iterable[Event | _Call]) -> dict[str, Any]:
    delta = _delta_of(events)
    message: dict[str, Any] = {"content": delta.get("content", None if "tool_calls" in delta else "")}
    if "reasoning_content" in delta:
        message["reasoning_content"] = delta["reasoning_content"]
    if "tool_calls" in delta:
        message["tool_calls"] = [
            ToolCall(
                id=call.id, type="function",
                function=CalledFunction(name=call.function.name, arguments=call.function.arguments),
            )
            for call in delta["tool_calls"]
        ]  # fmt: skip
    return message


def _chat_entry(entry: Logprob) -> ChatTokenLogprob:
    assert entry.logprob is not None, "only the first token of a prompt has none, and chats do not echo the prompt"
    return ChatTokenLogprob.model_construct(
        token=entry.token, logprob=entry.logprob, bytes=entry.bytes, top_logprobs=list(entry.top)
    )
