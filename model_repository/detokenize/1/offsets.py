"""Computes the offset of each token in a window's text.

A decoder returns the text of ids, and not which character belongs to which token. So the offset of a token is computed
by decoding the ids before it, in a short context. This module does not know chunks.
"""

from __future__ import annotations

from collections.abc import Callable

# The character that decoders write for bytes that form no character, or not a complete one yet.
UNFINISHED = "\ufffd"
# The number of other tokens that may share a character: UTF-8 has at most four bytes.
_MAX_SHARING_TOKENS = 3
# A context of LONG tokens is cut to the first of these lengths that keeps the decoded text. There are five consecutive
# lengths, because one of any four consecutive byte tokens begins a character.
_LONG = 16
_SHORT = (8, 7, 6, 5, 4)
# Only random ids have no such cut for this long. Then the context is cut anyway, to bound the cost.
_TOO_LONG = 128


class TokenOffsets:
    """Computes offsets for ascending indexes."""

    def __init__(self, ids: list[int], decode: Callable[[list[int]], str], final: bool) -> None:
        self._ids = ids
        self._decode = decode
        self._final = final  # no later chunk completes a character
        # The ids from _begin on decode to the window's text from character _origin on.
        self._begin = self._origin = 0
        self._texts: dict[int, str] = {}

    def start(self, index: int) -> int:
        """The offset of this token's first character. A token that continues a character has the same offset as it."""
        self._shorten(index)
        whole = self._whole_text(index)
        ends = range(max(self._begin, index - _MAX_SHARING_TOKENS), index + 1)
        # The text before the token is stable, except for a character that is not complete yet.
        return self._origin + max(_common_length(self._text(end), whole) for end in ends)

    def _text(self, end: int) -> str:
        if end not in self._texts:
            self._texts[end] = self._decode(self._ids[self._begin : end])
        return self._texts[end]

    def _whole_text(self, index: int) -> str:
        """The text up to the end of the token's last character."""
        last = min(index + 1 + _MAX_SHARING_TOKENS, len(self._ids))
        for end in range(index + 1, last + 1):
            if not self._text(end).endswith(UNFINISHED):
                return self._text(end)
        text = self._text(last)
        return text if self._final or last < len(self._ids) else text.rstrip(UNFINISHED)

    def _shorten(self, index: int) -> None:
        if index - self._begin < _LONG:
            return
        text = self._text(index)
        for length in _SHORT:
            short = self._decode(self._ids[index - length : index])
            if _is_whole(short) and text.endswith(short):
                break
        else:
            if index - self._begin < _TOO_LONG:
                return
        self._begin, self._origin = index - length, self._origin + len(text) - len(short)
        self._texts = {}


def _common_length(first: str, second: str) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _is_whole(text: str) -> bool:
    return bool(text) and not text.startswith(UNFINISHED) and not text.endswith(UNFINISHED)
