"""Where in a window's text each token begins.

Decoders say what ids read as, not which characters are whose; so a token's place is found by decoding the ids before
it, in a context short enough to stay cheap. It knows nothing of chunks.
"""

from __future__ import annotations

from collections.abc import Callable

# What decoders put in the place of bytes that are no character, or not yet one.
UNFINISHED = "\ufffd"
# Other tokens that a character may be shared with: UTF-8 has four bytes at most.
_MOST_SHARED_WITH = 3
# A context of so many tokens is cut to one of these lengths, the first that proves harmless. Five in a row: a run of
# byte tokens has the beginning of a character among them.
_LONG = 16
_SHORT = (8, 7, 6, 5, 4)
# Only noise has no harmless cut for so long; there the context is cut all the same, or its cost would grow and grow.
_TOO_LONG = 128


class TokenPlaces:
    """To be asked for one index after the other, going up."""

    def __init__(self, ids: list[int], decode: Callable[[list[int]], str], final: bool) -> None:
        self._ids = ids
        self._decode = decode
        self._final = final  # no later chunk will finish a character
        # The ids from _begin on decode to the window's text from character _origin on.
        self._begin = self._origin = 0
        self._texts: dict[int, str] = {}

    def start(self, index: int) -> int:
        """The character at which the text of this token begins; that of a token that continues one, at that one."""
        self._shorten(index)
        whole = self._whole_text(index)
        ends = range(max(self._begin, index - _MOST_SHARED_WITH), index + 1)
        # What is before the token stays as it is, save for a character that is still being written.
        return self._origin + max(_shared(self._text(end), whole) for end in ends)

    def _text(self, end: int) -> str:
        if end not in self._texts:
            self._texts[end] = self._decode(self._ids[self._begin : end])
        return self._texts[end]

    def _whole_text(self, index: int) -> str:
        """The text up to where the token's last character is finished."""
        last = min(index + 1 + _MOST_SHARED_WITH, len(self._ids))
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


def _shared(first: str, second: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _is_whole(text: str) -> bool:
    return bool(text) and not text.startswith(UNFINISHED) and not text.endswith(UNFINISHED)
