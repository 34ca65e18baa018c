"""A chunk: one part of a sequence's output, sent from `generate` to `detokenize`.

`generate` describes the text to emit as a window of token ids and the characters to cut at both ends; `detokenize`
turns the window into text. This module knows the chunk's JSON and its tensor, not the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from . import tensors
from .errors import InvalidRequest
from .tensors import Array, TensorSpec

# JSON has no minus infinity; OpenAI's API uses this number instead.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Usage:
    """Tokens so far. `cached` counts the prompt tokens that were found in the prefix cache."""

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
    # `detokenize` sends its outputs to the caller as one tensor.
    as_piece: bool = False
    # The stop string that ended the text, if one did.
    stop: str = ""

    def to_arrays(self) -> dict[TensorSpec, Array]:
        """The output tensor of `generate`."""
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
                **({"stop": self.stop} if self.stop else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Chunk:
        try:
            fields = json.loads(text)
            new, start, end = _triple(fields["window_cut"])
            return cls(
                index=_integer(fields["index"]),
                window_ids=[_integer(token) for token in fields["window_ids"]],
                window_new=new,
                cut_start=start,
                cut_end=end,
                skip_special_tokens=bool(fields["skip_special_tokens"]),
                finish_reason=_text(fields["finish_reason"]),
                usage=Usage(*_triple(fields["usage"])),
                token_ids=[_integer(token) for token in fields["token_ids"]],
                seed=_integer(fields["seed"], 64),
                logprobs=None if fields["logprobs"] is None else [_entry(*row) for row in fields["logprobs"]],
                as_piece=bool(fields["as_piece"]),
                stop=_text(fields.get("stop", "")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest("chunk must be a JSON object, as generate makes it", "chunk") from error


# Shared: `json.dumps` would create an encoder for each call.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _integer(value: object, bits: int = 32) -> int:
    """A signed integer that fits the tensor's type."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise TypeError(f"not an integer of {bits} bits")
    return value


def _triple(values: list[object]) -> tuple[int, int, int]:
    first, second, third = values
    return _integer(first), _integer(second), _integer(third)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _row(entry: TokenLogprob) -> list[object]:
    return [
        entry.token_id,
        None if entry.logprob is None else max(entry.logprob, LOWEST_LOGPROB),
        [(token, max(logprob, LOWEST_LOGPROB)) for token, logprob in entry.top],
    ]


def _entry(token_id: int, logprob: float | None, top: list[tuple[int, float]]) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, tuple((token, value) for token, value in top))
