"""Samples the next token of each sequence from a batch of logits, with log-probabilities where they are requested.

The order: repetition, frequency and presence penalty, logit bias, ban of the end tokens before min_tokens, token mask,
then greedy choice or temperature, top-k, top-p, min-p and one random sample. The random number is a function of (seed,
choice, position). Log-probabilities are those of the logits, with their token mask and nothing else. This module does
not know where logits and masks come from, how sequences are scheduled, nor text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract.chunk import TokenLogprob

from .logit_filters import SamplingSettings, uniform
from .logit_filters import sample_tokens as sample_with_torch
from .logprobs import Score, Scores
from .logprobs import score as score_with_torch
from .sampling_state import SamplingState
from .scratch import SCRATCH_BYTES, rows_at_once, take_rows
from .token_masks import TokenMasks
from .transfer import row_index, to_host

__all__ = ["Sampled", "SamplingState", "sample", "uniform"]

# Bytes per logit of a changed row (float32). Changed rows use half of the scratch memory, sampling uses the other half.
_CHANGED_BYTES = 4

# Samples one token id for each of these rows of logits; logit_filters.sample_tokens is the torch implementation.
SampleTokens = Callable[
    [torch.Tensor, Sequence[SamplingSettings], npt.NDArray[np.float64], Sequence[int], TokenMasks | None], torch.Tensor
]


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class Argmax:
    """The largest logit of each row (NaN where the row holds one) and its token id."""

    values: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Argmax:
        return cls(*logits.max(dim=-1))

    def rows(self, rows: Sequence[int]) -> Argmax:
        index = row_index(rows, self.ids.device)
        return Argmax(self.values[index], self.ids[index])


@dataclass(frozen=True)
class PendingTokens:
    """Each row's next token, on the device of its logits. A row is unusable if it holds NaN or no finite logit.

    Nothing of it depends on logits any more: the next step may overwrite them.
    """

    ids: torch.Tensor
    usable: torch.Tensor
    # The rows whose log-probabilities are requested, their number of alternatives, and the scores.
    scored: Sequence[int]
    alternatives: Sequence[int]
    scores: Scores | None
    # Whether rows have masks, so that alternatives may be impossible.
    has_masks: bool

    def start_copy(self) -> HostTokens:
        """Start the copy of the tokens to the host."""
        scores = self.scores
        columns = (scores.usable, scores.own, scores.best_ids, scores.best) if scores else ()
        return HostTokens(self, to_host((self.ids, self.usable, *columns)))


class HostTokens:
    """Tokens on their way to the host."""

    def __init__(self, tokens: PendingTokens, wait: Callable[[], list[torch.Tensor]]) -> None:
        self._tokens, self._wait = tokens, wait

    @property
    def ids(self) -> torch.Tensor:
        """The tokens on the device."""
        return self._tokens.ids

    def read(self) -> list[Sampled | None]:
        """The tokens, with log-probabilities where they are requested; None for an unusable row."""
        numbers, usable, *columns = self._wait()
        ids: list[int] = numbers.tolist()
        logprobs: dict[int, TokenLogprob | None] = {}
        if columns:
            scored = self._tokens.scored
            entries = Scores(*columns).entries([ids[row] for row in scored], self._tokens.alternatives)
            if self._tokens.has_masks:
                entries = [entry and _without_impossible(entry) for entry in entries]
            logprobs = dict(zip(scored, entries, strict=True))
        return [
            Sampled(token_id, logprobs.get(row)) if is_usable else None
            for row, (token_id, is_usable) in enumerate(zip(ids, usable.tolist(), strict=True))
        ]


def _without_impossible(entry: TokenLogprob) -> TokenLogprob:
    """The entry without alternatives that the row's mask does not allow."""
    return replace(entry, top=tuple(one for one in entry.top if one[1] > -np.inf))


def sample(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    best: Argmax | None = None,
    sample_tokens: SampleTokens = sample_with_torch,
    score: Score = score_with_torch,
    rows: Sequence[int] | None = None,
    masks: TokenMasks | None = None,
) -> list[Sampled | None]:
    """The next token of each of these rows, or of all; `masks` has one entry for each of them.

    None for a row that holds NaN or no finite logit that its mask allows.
    """
    if best and not masks and all(state.is_plain for state in states):
        return _plain_tokens(logits, states, best, sample_tokens, range(len(states)) if rows is None else rows)
    return choose_tokens(logits, states, best, sample_tokens, score, rows, masks).start_copy().read() if states else []


def _plain_tokens(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    best: Argmax,
    sample_tokens: SampleTokens,
    rows: Sequence[int],
) -> list[Sampled | None]:
    """As `choose_tokens` where nothing changes the logits and none are scored, with few calls into torch: right after a
    step its code lies in no cache, and each call takes as long as a layer of a small model."""
    values, best_ids = best.values.tolist(), best.ids.tolist()
    ids = [best_ids[row] for row in rows]
    if random := [n for n, state in enumerate(states) if not state.is_greedy]:
        members = [states[n] for n in random]
        sampled = _sample_rows(logits, [rows[n] for n in random], members, sample_tokens, 0, None).tolist()
        for n, token_id in zip(random, sampled, strict=True):
            ids[n] = token_id
    return [
        Sampled(token_id, None) if math.isfinite(values[row]) else None for row, token_id in zip(rows, ids, strict=True)
    ]


def choose_tokens(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    best: Argmax | None,
    sample_tokens: SampleTokens,
    score: Score,
    rows: Sequence[int] | None = None,
    masks: TokenMasks | None = None,
    offset: int = 0,
) -> PendingTokens:
    """Each row's next token, or the token `offset` positions after it. Nothing here waits for a GPU."""
    all_rows = rows is None or list(rows) == list(range(len(logits)))
    rows = range(len(logits)) if rows is None else rows
    assert len(rows) == len(states), "one row of logits for each sequence"
    best = best or Argmax.of(logits)
    best = best if all_rows else best.rows(rows)
    tokens, usable = best.ids.clone(), best.values.isfinite()
    masked = [n for n in range(len(states)) if masks and masks.masks(n)]
    # Chosen by `sample_tokens`; of the others the best token is known.
    sampled = {*masked, *(n for n, state in enumerate(states) if not state.is_greedy)}

    def sample_rows(source: torch.Tensor, source_rows: Sequence[int], members: Sequence[int]) -> torch.Tensor:
        member_masks = masks and masks.take(members)
        return _sample_rows(source, source_rows, [states[n] for n in members], sample_tokens, offset, member_masks)

    changed = [n for n, state in enumerate(states) if state.changes_logits(offset)]
    for group in _groups(changed, logits):
        altered = torch.empty(len(group), logits.shape[-1], device=logits.device)
        for row, n in enumerate(group):
            altered[row] = states[n].change(logits[rows[n]].float(), offset)
        greedy, index = Argmax.of(altered), row_index(group, tokens.device)
        tokens[index], usable[index] = greedy.ids, usable[index] & greedy.values.isfinite()
        if altered_rows := [row for row, n in enumerate(group) if n in sampled]:
            members = [group[row] for row in altered_rows]
            tokens[row_index(members, tokens.device)] = sample_rows(altered, altered_rows, members)
    if plain := sorted(sampled - set(changed)):
        ids = sample_rows(logits, [rows[n] for n in plain], plain)
        if len(plain) == len(states):
            tokens = ids
        else:
            tokens[row_index(plain, tokens.device)] = ids
    if masked:
        # A row whose mask allows no token.
        usable &= tokens >= 0
        tokens.clamp_(min=0)
    scored = [n for n, state in enumerate(states) if state.parameters.logprobs is not None]
    alternatives = [states[n].parameters.logprobs or 0 for n in scored]
    scores = None
    if scored:
        scores = _scores(logits, [rows[n] for n in scored], tokens, scored, max(alternatives), score, masks)
    return PendingTokens(tokens, usable, scored, alternatives, scores, masks is not None)


def _scores(
    logits: torch.Tensor, rows: Sequence[int], tokens: torch.Tensor, scored: Sequence[int], alternatives: int,
    score: Score, masks: TokenMasks | None,
) -> Scores:  # fmt: skip
    """The log-probabilities of the tokens of these rows, with their masks."""
    if masks:
        logits, rows = masks.take(scored).apply(take_rows(logits, rows).float()), range(len(rows))
    return score(logits, rows, tokens[row_index(scored, tokens.device)], alternatives)


def _groups(numbers: Sequence[int], logits: torch.Tensor) -> Iterator[list[int]]:
    """The numbers in groups whose copied rows fit into the scratch memory."""
    step = rows_at_once(_CHANGED_BYTES * logits.shape[-1], SCRATCH_BYTES // 2)
    return (list(numbers[n : n + step]) for n in range(0, len(numbers), step))


def _sample_rows(
    logits: torch.Tensor,
    rows: Sequence[int],
    states: Sequence[SamplingState],
    sample_tokens: SampleTokens,
    offset: int,
    masks: TokenMasks | None,
) -> torch.Tensor:
    uniforms = uniform(
        [state.seed for state in states],
        [state.parameters.choice for state in states],
        [state.position + offset for state in states],
    )
    return sample_tokens(logits, [state.settings for state in states], uniforms, rows, masks)
