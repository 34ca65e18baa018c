"""Builds OpenAI's completions from a call's pieces, complete or chunk by chunk. `chat_results` builds chats. No I/O.

A builder belongs to one call. `chunk` takes one piece of any sequence as it arrives; `build` takes all pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from tritonlm.client.sequences import Plan, usage_of
from tritonlm.client.types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    FinishReason,
    Logprob,
    Piece,
)
from tritonlm.contract import Cancelled, EngineFailure, TimedOut

_TEXT = "text_completion"


class SequenceBuilder:
    """Shared by completions and chats: checks the order and the end of sequences, and sums the usage."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._last: dict[int, Piece] = {}
        # The length of each sequence's text so far.
        self._text_length: dict[int, int] = {}

    def _record(self, sequence: int, piece: Piece) -> int:
        """Record a piece; returns the offset of its text in the sequence's text."""
        before = self._last.get(sequence)
        expected = 0 if before is None else before.index + 1
        if piece.index != expected:
            raise EngineFailure(f"received chunk {piece.index}, expected chunk {expected}; send the request again")
        if piece.finish_reason == "timeout":
            raise TimedOut.of_request()
        if piece.finish_reason == "cancelled":
            raise Cancelled("the request was cancelled")
        self._last[sequence] = piece
        offset = self._text_length.get(sequence, 0)
        self._text_length[sequence] = offset + len(piece.text)
        return offset

    @property
    def usage(self) -> CompletionUsage:
        return usage_of(self.plan, self._last)

    def _extras(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Extensions of OpenAI's format: at the end of a sequence its seed and the stop string, and token ids if
        requested."""
        last = pieces[-1]
        extras: dict[str, Any] = {"seed": last.seed} if last.finish_reason else {}
        if last.stop:
            extras["stop_reason"] = last.stop
        if self.plan.parameters.return_token_ids:
            extras["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return extras

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": self.plan.id, "object": kind, "created": self.plan.created, "model": self.plan.model.name}

    def _null_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.plan.include_usage else {}


class CompletionBuilder(SequenceBuilder):
    def chunk(self, sequence: int, piece: Piece) -> Completion:
        offset = self._record(sequence, piece)
        # Validation takes half the time of `model_construct`.
        choice = CompletionChoice(
            index=sequence,
            text=piece.text,
            logprobs=self._logprobs(piece.logprobs, offset),
            finish_reason=finish_reason_of(piece),
            **self._extras([piece]),
        )
        return Completion(**self._common(_TEXT), choices=[choice], **self._null_usage())

    def usage_chunk(self) -> Completion:
        return Completion(**self._common(_TEXT), choices=[], usage=self.usage)

    def build(self, sequences: Sequence[Sequence[Piece]]) -> Completion:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(sequences)]
        kept: list[int] = []
        for first in range(0, len(choices), self.plan.each):
            group = range(first, first + self.plan.each)
            best = sorted(group, key=lambda index: -_mean_logprob(sequences[index]))[: self.plan.n]
            # Without best_of the choices keep their order.
            kept += best if self.plan.each > self.plan.n else group
        return Completion(
            **self._common(_TEXT),
            choices=[choices[old].model_copy(update={"index": new}) for new, old in enumerate(kept)],
            usage=self.usage,
        )

    def _choice(self, sequence: int, pieces: Sequence[Piece]) -> CompletionChoice:
        parts = [self.chunk(sequence, piece).choices[0] for piece in pieces]
        last = parts[-1]
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        return CompletionChoice(
            index=sequence,
            text="".join(part.text for part in parts),
            logprobs=_join(logprobs) if logprobs else None,
            finish_reason=last.finish_reason,
            **self._extras(pieces),
        )

    def _logprobs(self, entries: Sequence[Logprob] | None, offset: int) -> CompletionLogprobs | None:
        if entries is None or not self.plan.show_logprobs:
            return None
        return CompletionLogprobs.model_construct(
            tokens=[entry.token for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[_top(entry) for entry in entries],
            text_offset=[offset + entry.offset for entry in entries],
        )


def _top(entry: Logprob) -> dict[str, float] | None:
    """The best alternatives by text, and the token itself. Of several tokens with the same text, the likeliest."""
    if entry.logprob is None:
        return None
    logprobs: dict[str, float] = {}
    for top in entry.top:
        logprobs.setdefault(top.token, top.logprob)
    logprobs.setdefault(entry.token, entry.logprob)
    return logprobs


def _join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )


def _mean_logprob(pieces: Sequence[Piece]) -> float:
    """The mean log-probability of the generated tokens; with echo, the prompt's entries come first and are skipped."""
    generated = pieces[-1].completion_tokens
    entries = [entry for piece in pieces for entry in piece.logprobs or []]
    values = [entry.logprob for entry in entries[len(entries) - generated :] if entry.logprob is not None]
    return sum(values) / len(values) if values else float("-inf")


def finish_reason_of(piece: Piece) -> FinishReason | None:
    assert piece.finish_reason in ("", "stop", "length"), piece.finish_reason
    return cast(Literal["stop", "length"], piece.finish_reason) if piece.finish_reason else None
