"""A chunk: one step of an answer, from `generate` through `detokenize` to the caller.

`generate` decides what text may leave and describes it as a window of token ids with characters to cut at both
ends; `detokenize` turns the window into text. This file knows the tensors and the JSON inside them, not the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import tensors
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

    def to_arrays(self) -> dict[TensorSpec, Array]:
        """The tensors that `generate` sends."""
        return {spec: spec.pack(value) for spec, value in self.values().items()}

    def values(self) -> dict[TensorSpec, str | int | Sequence[int]]:
        """What is in them."""
        cut = (self.window_new, self.cut_start, self.cut_end, int(self.skip_special_tokens))
        usage = (self.usage.prompt, self.usage.completion, self.usage.cached)
        return {
            tensors.WINDOW_IDS: self.window_ids,
            tensors.WINDOW_CUT: cut,
            tensors.TOKEN_LOGPROBS: dump_logprobs(self.logprobs),
            tensors.CHUNK_INDEX: self.index,
            tensors.FINISH_REASON: self.finish_reason,
            tensors.USAGE: usage,
            tensors.TOKEN_IDS: self.token_ids,
            tensors.SEED: self.seed,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Chunk:
        """The chunk behind the tensors that `detokenize` receives, by tensor name."""

        def numbers(spec: TensorSpec) -> list[int]:
            found: list[int] = arrays[spec.name].reshape(-1).tolist()
            return found

        new, start, end, skip = numbers(tensors.WINDOW_CUT)
        return cls(
            index=numbers(tensors.CHUNK_INDEX)[0],
            window_ids=numbers(tensors.WINDOW_IDS),
            window_new=new,
            cut_start=start,
            cut_end=end,
            skip_special_tokens=bool(skip),
            finish_reason=tensors.FINISH_REASON.text(arrays["finish_reason"]),
            usage=Usage(*numbers(tensors.USAGE)),
            token_ids=numbers(tensors.TOKEN_IDS),
            seed=numbers(tensors.SEED)[0],
            logprobs=load_logprobs(tensors.TOKEN_LOGPROBS.text(arrays["token_logprobs"])),
        )


def dump_logprobs(logprobs: list[TokenLogprob] | None) -> str:
    """Log-probabilities by token id as compact JSON; empty when none were asked for."""
    if logprobs is None:
        return ""
    rows = [
        [
            entry.token_id,
            None if entry.logprob is None else max(entry.logprob, LOWEST_LOGPROB),
            [[token, max(logprob, LOWEST_LOGPROB)] for token, logprob in entry.top],
        ]
        for entry in logprobs
    ]
    return json.dumps(rows, separators=(",", ":"))


def load_logprobs(text: str) -> list[TokenLogprob] | None:
    if not text:
        return None
    return [
        TokenLogprob(token_id, logprob, tuple((token, value) for token, value in top))
        for token_id, logprob, top in json.loads(text)
    ]
