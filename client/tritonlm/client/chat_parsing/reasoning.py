"""Splits an answer into reasoning and the answer proper, by the tags of the checkpoint; another parser reads the rest.

Reasoning is recognized at the beginning of an answer only, and where the prompt has begun it already.
"""

from __future__ import annotations

from tritonlm.client.chat_parsing.events import Event, Parser, Reasoning
from tritonlm.client.chat_parsing.scanning import Scanner

_SPACE = " \t\r\n"


class ReasoningParser(Scanner):
    def __init__(self, tags: tuple[str, str], answer: Parser, begun: bool = False) -> None:
        """`begun`: the prompt ends inside reasoning."""
        super().__init__()
        self._begin, self._end = tags
        self._answer = answer
        self._state = self._inside if begun else self._before
        self._space = ""
        self._any = False

    def _step(self) -> bool:
        return self._state()

    def _before(self) -> bool:
        text = self._buffer.lstrip(_SPACE)
        if not text or (not self._ended and text != self._begin and self._begin.startswith(text)):
            return False
        if text.startswith(self._begin):
            self._buffer = text[len(self._begin) :]
            self._state = self._inside
        else:
            self._state = self._after
        return True

    def _inside(self) -> bool:
        text, end = self._until((self._end,))
        # Without the line breaks around it.
        text = self._space + text
        if not self._any:
            text = text.lstrip(_SPACE)
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if solid:
            self._any = True
            self._events.append(Reasoning(solid))
        if end:
            self._state = self._between
        return bool(end)

    def _between(self) -> bool:
        self._skip(_SPACE)
        if not self._buffer:
            return False
        self._state = self._after
        return True

    def _after(self) -> bool:
        if self._buffer:
            self._events += self._answer.feed(self._take(len(self._buffer)))
        return False

    def _finish(self) -> None:
        if self._buffer:
            self._events += self._answer.feed(self._take(len(self._buffer)))
        self._events += self._answer.flush()


class TokenFilter:
    """Leaves the texts of some special tokens out of an answer that shows them all for the sake of its markers."""

    def __init__(self, tokens: tuple[str, ...], answer: Parser) -> None:
        self._tokens, self._answer = tokens, answer
        self._scanner = _Removal(tokens)

    def feed(self, text: str) -> list[Event]:
        return self._answer.feed(self._scanner.clean(text))

    def flush(self) -> list[Event]:
        return self._answer.feed(self._scanner.clean("", last=True)) + self._answer.flush()


class _Removal(Scanner):
    def __init__(self, tokens: tuple[str, ...]) -> None:
        super().__init__()
        self._tokens = tokens

    def clean(self, text: str, last: bool = False) -> str:
        self._buffer += text
        self._ended = last
        parts, found = [], "…"
        while found:
            part, found = self._until(self._tokens)
            parts.append(part)
        return "".join(parts)
