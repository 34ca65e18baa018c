"""What text may leave, and when: whole characters only, nothing of a stop string, every character once.

It is fed one generated token at a time and describes the text that leaves as windows of ids with characters to cut
at both ends, so that `detokenize` can be a pure function of one message. It does not know which tokenizer stands
behind `decode`, when windows are taken, nor why a text ends.

Positions are characters, counted from the start of the prompt's text. What is ready to leave is decided in `feed`, so
it depends on the tokens fed and on nothing else: a resumed text goes on exactly where the last window of the earlier
one ended. Decoders with byte fallback show a run of bytes as nothing but U+FFFD once it turns out invalid: then what
was shown stays shown, and what follows is counted on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What decoders put in the place of bytes that are no character, or not yet one.
UNFINISHED = "\ufffd"
# The context is shortened when it holds so many tokens, to the first of these lengths that proves harmless.
LONG_CONTEXT = 8
SHORT_CONTEXTS = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Window:
    """decode(ids)[cut_start : len - cut_end] is the text that leaves now; `new` ids at the end are new ones."""

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
        self._text = prompt_text  # what the ids of _context decode to
        self._finished = len(prompt_text.rstrip(UNFINISHED))  # up to here characters are final, and searched for stops
        self._prompt_unfinished = len(prompt_text) - self._finished
        self._ready = self._finished  # up to here text may leave
        self._shown = 0 if show_prompt else self._finished  # up to here text has left
        self._stopped = False

        self._context = self._sent_context = _Context(0, 0)
        self._shorten_at = 0
        self._shorten_context()
        if not show_prompt:
            self._sent_context = self._context

    @property
    def stopped(self) -> bool:
        """A stop string was found: no more tokens are wanted."""
        return self._stopped

    def feed(self, token_id: int) -> bool:
        """Take one generated token; True when it has just completed a stop string."""
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
        """The text that may leave now, or None when there is none."""
        if self._ready <= self._shown:
            return None
        ids, text = self._sent_ids()
        # Text that was ready may have become part of an unfinished run of bytes since: it leaves when that is done.
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        tail, begin = self._tail(), self._sent_context.start
        cut_end = max(tail, unfinished)
        if self._shown - begin + cut_end >= len(text):
            return None
        return self._send(ids, text, cut_end, self._ready if cut_end == tail else begin + len(text) - cut_end)

    def flush(self) -> Window:
        """Everything that is left, up to a stop string that was found. Its text may be empty."""
        if not self._stopped:
            self._advance(len(self._text))
        if not self._stopped:
            self._ready = self._finished
        ids, text = self._sent_ids()
        return self._send(ids, text, min(self._tail(), len(text)), self._ready)

    def _sent_ids(self) -> tuple[list[int], str]:
        """All ids that were not sent yet, behind their context, and what they decode to."""
        ids = self._ids[self._sent_context.index :]
        return ids, self._decode(ids)

    def _tail(self) -> int:
        """Characters at the text's end that stay. Counted from there: where a decoder changes its mind about an
        earlier part, nothing later gets lost."""
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
        """The first `finished` characters of the text are final now: search the new ones for stop strings."""
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
        """A prompt of raw ids ended inside a character. If the answer finished it, then it is the answer's;
        otherwise its replacement characters stay the prompt's."""
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
            completed = [len(stop.text) for stop in self._stops if stop.feed(character)]
            if completed and self._generated >= self._min_tokens:
                self._stopped = True
                self._ready = position - max(completed)
                return
        # Held back: the longest end of the text that a stop string begins with.
        self._ready = self._finished - max(stop.matched for stop in self._stops)

    def _shorten_context(self) -> None:
        """Move the context's beginning forward where no later token can tell the difference.

        A context is harmless when it decodes to text with whole characters at both ends that is the end of the
        longer context's text: then both go on in the same way. An empty text is not (skipped special tokens; a first
        token whose only character, a space, is stripped).
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
        self._shorten_at = max(LONG_CONTEXT, 2 * count)  # tried in vain: wait, so that the cost stays small


def _is_whole(text: str) -> bool:
    return bool(text) and not text.startswith(UNFINISHED) and not text.endswith(UNFINISHED)


class _StopString:
    """Knuth, Morris and Pratt's search for one string, a character at a time."""

    def __init__(self, text: str) -> None:
        assert text, "a stop string has at least one character"
        self.text = text
        self.matched = 0  # the text's last so many characters are the beginning of the stop string
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
    """For each prefix of the text: the length of its longest proper prefix that it also ends with."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return borders
