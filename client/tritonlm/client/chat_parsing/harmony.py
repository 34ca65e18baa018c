"""Parses harmony, the format of gpt-oss: messages with channels; `analysis` is reasoning, a recipient is a call.

<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}
"""

from __future__ import annotations

import re

from tritonlm.client.chat_parsing.events import CallArguments, CallStart, Reasoning
from tritonlm.client.chat_parsing.scanning import ContentWriter, Scanner

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser(Scanner):
    def __init__(self) -> None:
        super().__init__()
        self._content = ContentWriter(self)
        self._header = ""
        self._in_message = False
        # What the current message is: reasoning, the index of a call, or None for content.
        self._is_reasoning = False
        self._call: int | None = None
        self._has_message = False

    def _step(self) -> bool:
        return self._body() if self._in_message else self._head()

    def _head(self) -> bool:
        text, marker = self._until((_MESSAGE,))
        self._header += text
        if not marker:
            return False
        channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
        self._header, self._in_message, self._has_message = "", True, True
        self._call = None
        if recipient is not None and recipient[1] != "assistant":
            self._call = self._content.begin_call()
            self._events.append(CallStart(self._call, recipient[1]))
        self._is_reasoning = self._call is None and channel is not None and channel[1] == "analysis"
        return True

    def _body(self) -> bool:
        text, marker = self._until(_ENDS)
        if text:
            self._emit(text)
        if marker:
            self._in_message = False
            self._header = marker if marker in ("<|start|>", "<|channel|>") else ""
        return bool(marker)

    def _emit(self, text: str) -> None:
        if self._call is not None:
            self._events.append(CallArguments(self._call, text))
        elif self._is_reasoning:
            self._events.append(Reasoning(text))
        else:
            self._content.write(text)

    def _finish(self) -> None:
        if not self._has_message:
            # No message at all: the answer is plain text.
            self._content.write(self._header)
        self._content.end()
