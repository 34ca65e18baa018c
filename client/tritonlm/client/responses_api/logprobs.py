"""The log-probabilities of a message's text, from those of all tokens of a chat's answer.

The tokens of reasoning, of tool calls and of the markers around them belong to no text. It knows chats only by their
fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


class TextLogprobs:
    def __init__(self) -> None:
        # The entries of tokens whose text was neither returned nor left out yet.
        self._pending: list[Json] = []
        # Whether a parser has found more than text: until then, all tokens are those of the text.
        self._has_more = False

    def take(self, message: Any, entries: Sequence[Json]) -> list[Json]:
        """The entries of the content of a chat's message, or of a delta. `entries`: those that it came with."""
        self._pending += entries
        has_more = bool(getattr(message, "reasoning_content", None) or getattr(message, "tool_calls", None))
        self._has_more |= has_more
        if message.content is None and not has_more:
            # The parser holds the text back.
            return []
        pending, self._pending = self._pending, []
        if not self._has_more:
            return pending
        if not message.content:
            return []
        return self._of_content(message, pending)

    def _of_content(self, message: Any, entries: list[Json]) -> list[Json]:
        raw, content = b"".join(bytes(entry["bytes"] or ()) for entry in entries), message.content.encode()
        if getattr(message, "tool_calls", None):
            # Text comes before the calls, and the arguments of a call may hold the same text.
            reasoning = (getattr(message, "reasoning_content", None) or "").encode()
            start = raw.find(content, max(0, raw.find(reasoning)) + len(reasoning))
        else:
            start = raw.rfind(content)
        if start < 0:
            return []
        stop = start + len(content)
        ends = list(itertools.accumulate(len(entry["bytes"] or ()) for entry in entries))
        spans = list(zip(entries, [0, *ends], ends, strict=False))
        # What follows is white space, or the beginning of a marker, that the parser holds back.
        self._pending = [entry for entry, begin, _ in spans if begin >= stop]
        return [entry for entry, begin, end in spans if begin < stop and end > start]
