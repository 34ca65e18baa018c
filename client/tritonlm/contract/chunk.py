"""A chunk: one step of an answer, from `generate` through `detokenize` to the caller.

`generate` decides what text may leave and describes it as a window of token ids with characters to cut at both
ends; `detokenize` turns the window into text. This file knows the chunk's JSON and its tensor, not the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from . import tensors
from .errors import InvalidRequest
from .tensors import Array, TensorSpec

# JSON has no minus infinity: OpenAI's clients know this number instead.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Usage:
    """Tokens so far. `cached` counts the prompt tokens whose keys and values were already there."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (None: the first token of a prompt) and its best alternatives."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    index: int
    window_ids: list[int]
    window_new: int
    cut_start: int
    cut_end: int
    skip_special_tokens: bool = True
    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    token_ids: list[int] = field(default_factory=list)
    seed: int = 0
    logprobs: list[TokenLogprob] | None = None
    # To the caller it goes as one tensor again.
    as_piece: bool = False

    def to_arrays(self) -> dict[TensorSpec, Array]:
        """What `generate` sends."""
        return {tensors.CHUNK: tensors.CHUNK.pack(self.to_json())}

    def to_json(self) -> str:
        return _encode(
            {
                "index": self.index,
                "window_ids": self.window_ids,
                "window_cut": (self.window_new, self.cut_start, self.cut_end),
                "skip_special_tokens": self.skip_special_tokens,
                "finish_reason": self.finish_reason,
                "usage": (self.usage.prompt, self.usage.completion, self.usage.cached),
                "token_ids": self.token_ids,
                "seed": self.seed,
                "logprobs": None if self.logprobs is None else [_row(entry) for entry in self.logprobs],
                "as_piece": self.as_piece,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Chunk:
        try:
            found = json.loads(text)
            new, start, end = _three(found["window_cut"])
            return cls(
                index=_whole(found["index"]),
                window_ids=[_whole(token) for token in found["window_ids"]],
                window_new=new,
                cut_start=start,
                cut_end=end,
                skip_special_tokens=bool(found["skip_special_tokens"]),
                finish_reason=_text(found["finish_reason"]),
                usage=Usage(*_three(found["usage"])),
                token_ids=[_whole(token) for token in found["token_ids"]],
                seed=_whole(found["seed"], 64),
                logprobs=None if found["logprobs"] is None else [_entry(*row) for row in found["logprobs"]],
                as_piece=bool(found["as_piece"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest("chunk must be a JSON object, as generate makes it", "chunk") from error


# One for all of them: `json.dumps` would make one each time.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _whole(value: object, bits: int = 32) -> int:
    """As its tensor can hold it."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise TypeError(f"no whole number of {bits} bits")
    return value


def _three(values: list[object]) -> tuple[int, int, int]:
    first, second, third = values
    return _whole(first), _whole(second), _whole(third)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _row(entry: TokenLogprob) -> list[object]:
    lowest, own = LOWEST_LOGPROB, entry.logprob
    return [
        entry.token_id,
        None if own is None else max(own, lowest),
        [(token, max(logprob, lowest)) for token, logprob in entry.top],
    ]


def _entry(token_id: int, logprob: float | None, top: list[tuple[int, float]]) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, tuple((token, value) for token, value in top))
