"""Decides which text may be sent: whole characters only, no part of a stop string, each character once.

It takes one generated token at a time. It describes the released text as windows of ids with characters to cut at both
ends, so that `detokenize` is a pure function of one message. It does not know the tokenizer behind `decode`, when
windows are taken, nor why a text ends.

Positions are characters, counted from the start of the prompt's text. `feed` alone decides what is ready, so the result
depends on the fed tokens only: a resumed text continues exactly where the last window of the interrupted one ended.
Decoders with byte fallback replace a whole run of bytes by U+FFFD once it turns out invalid. Text that was sent before
stays as it is, and later text is counted from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The character that decoders write for bytes that form no character, or not a complete one yet.
UNFINISHED = "\ufffd"
# A context of LONG_CONTEXT tokens is shortened to the first of these lengths that keeps the decoded text.
LONG_CONTEXT = 8
SHORT_CONTEXTS = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Window:
    """The released text is decode(ids)[cut_start : len - cut_end]; the last `new` ids are new."""

    ids: list[int]
    new: int
    cut_start: int
    cut_end: int


@dataclass(frozen=True)
class _Context:
    """The ids from `index` on decode to the text from character `start` on."""

    index: int
    start: int


class TextRelease:
    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        show_prompt: bool = False,
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_ids)
        self._stops = [_StopString(stop) for stop in stops]
        self._min_tokens = min_tokens
        self._show_prompt = show_prompt
        self._generated = 0
        self._new = 0

        prompt_text = decode(self._ids)
        self._text = prompt_text  # decoded ids of _context
        self._finished = len(prompt_text.rstrip(UNFINISHED))  # up to here characters are final and searched for stops
        self._prompt_unfinished = len(prompt_text) - self._finished
        self._ready = self._finished  # up to here text may be sent
        self._shown = 0 if show_prompt else self._finished  # up to here text has been sent
        self._stopped = False
        self.stop = ""  # the stop string that ended the text

        self._context = self._sent_context = _Context(0, 0)
        self._shorten_at = 0
        self._shorten_context()
        if not show_prompt:
            self._sent_context = self._context

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete. Then no more tokens may be fed."""
        return self._stopped

    def feed(self, token_id: int) -> bool:
        """Take one generated token. Return whether it completes a stop string."""
        assert not self._stopped, "no token may follow a stop string"
        self._ids.append(token_id)
        self._generated += 1
        self._new += 1
        self._text = self._decode(self._ids[self._context.index :])
        self._advance(len(self._text.rstrip(UNFINISHED)))
        if not self._stopped:
            self._shorten_context()
        return self._stopped

    def take(self) -> Window | None:
        """The text that may be sent now, or None."""
        if self._ready <= self._shown:
            return None
        ids, text = self._sent_ids()
        # Ready text may have become part of an unfinished run of bytes since. It is sent when that run is complete.
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        tail, begin = self._tail(), self._sent_context.start
        cut_end = max(tail, unfinished)
        if self._shown - begin + cut_end >= len(text):
            return None
        return self._send(ids, text, cut_end, self._ready if cut_end == tail else begin + len(text) - cut_end)

    def flush(self) -> Window:
        """All remaining text, up to a completed stop string. It may be empty."""
        if not self._stopped:
            self._advance(len(self._text))
        if not self._stopped:
            self._ready = self._finished
        ids, text = self._sent_ids()
        return self._send(ids, text, min(self._tail(), len(text)), self._ready)

    def _sent_ids(self) -> tuple[list[int], str]:
        """The context and all unsent ids, and their decoded text."""
        ids = self._ids[self._sent_context.index :]
        return ids, self._decode(ids)

    def _tail(self) -> int:
        """The number of characters at the text's end that are held back. Counted from the end, because a decoder may
        change the length of earlier text."""
        return max(0, self._context.start + len(self._text) - self._ready)

    def _send(self, ids: list[int], text: str, cut_end: int, shown: int) -> Window:
        cut_start = min(self._shown - self._sent_context.start, len(text) - cut_end)
        window = Window(ids, self._new, cut_start, cut_end)
        self._new = 0
        self._shown = max(self._shown, shown)
        if self._context.start <= self._shown:
            self._sent_context = self._context
        return window

    def _advance(self, finished: int) -> None:
        """Note that the first `finished` characters are final, and search the new ones for stop strings."""
        start = self._context.start
        if start + finished <= self._finished:
            return
        if self._prompt_unfinished:
            self._settle_prompt_end(finished)
        searched = self._text[self._finished - start : finished]
        self._finished = start + finished
        self._ready = self._finished
        if self._stops:
            self._search(searched)

    def _settle_prompt_end(self, finished: int) -> None:
        """Assign a character that begins in the prompt's raw ids: to the generated text if that completes it, else to
        the prompt, as replacement characters."""
        begin = self._finished - self._context.start
        tail = self._text[begin : min(finished, begin + self._prompt_unfinished)]
        self._finished += len(tail) - len(tail.lstrip(UNFINISHED))
        self._prompt_unfinished = 0
        if not self._show_prompt:
            self._shown = self._finished

    def _search(self, searched: str) -> None:
        position = self._finished - len(searched)
        for character in searched:
            position += 1
            completed = [stop.text for stop in self._stops if stop.feed(character)]
            if completed and self._generated >= self._min_tokens:
                self._stopped = True
                self.stop = max(completed, key=len)
                self._ready = position - len(self.stop)
                return
        # Hold back the longest end of the text that is the beginning of a stop string.
        self._ready = self._finished - max(stop.matched for stop in self._stops)

    def _shorten_context(self) -> None:
        """Move the start of the context forward, if later tokens decode the same with the shorter context.

        That holds when the shorter context decodes to whole characters at both ends and to the end of the longer
        context's text. It does not hold for an empty text: special tokens may be skipped, and a decoder may strip the
        leading space of the first token.
        """
        count = len(self._ids) - self._context.index
        end = self._context.start + len(self._text)
        if count < self._shorten_at or self._text.endswith(UNFINISHED):
            return
        for length in SHORT_CONTEXTS:
            if length >= count:
                break
            text = self._decode(self._ids[-length:])
            if _is_whole(text) and self._text.endswith(text):
                self._context = _Context(len(self._ids) - length, end - len(text))
                self._text = text
                self._shorten_at = LONG_CONTEXT
                return
        self._shorten_at = max(LONG_CONTEXT, 2 * count)  # no shorter context works: try again later


def _is_whole(text: str) -> bool:
    return bool(text) and not text.startswith(UNFINISHED) and not text.endswith(UNFINISHED)


class _StopString:
    """Knuth-Morris-Pratt search for one string, one character at a time."""

    def __init__(self, text: str) -> None:
        assert text, "a stop string has at least one character"
        self.text = text
        self.matched = 0  # the last `matched` characters of the text are the beginning of the stop string
        self._shorter = _borders(text)

    def feed(self, character: str) -> bool:
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[-1]
        return True


def _borders(text: str) -> list[int]:
    """For each prefix of the text: the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return borders
