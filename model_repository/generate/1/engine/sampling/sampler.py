"""Samples the next token of each sequence from a batch of logits, with log-probabilities where they are requested.

The order: repetition, frequency and presence penalty, logit bias, ban of the end tokens before min_tokens, token mask,
then greedy choice or temperature, top-k, top-p, min-p and one random sample. The random number is a function of (seed,
choice, position). Log-probabilities are those of the logits, with their token mask and nothing else. This module does
not know where logits and masks come from, how sequences are scheduled, nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract.chunk import TokenLogprob
from tritonlm.contract.errors import InvalidRequest
from tritonlm.contract.parameters import SamplingParameters

from .logit_filters import SamplingSettings, uniform
from .logit_filters import sample_tokens as sample_with_torch
from .logprobs import Score
from .logprobs import score as score_with_torch
from .scratch import SCRATCH_BYTES, rows_at_once, take_rows
from .token_masks import TokenMasks
from .transfer import row_index

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


class SamplingState:
    """The sampling state of one sequence: its parameters, its position, and its token counts."""

    def __init__(
        self,
        parameters: SamplingParameters,
        seed: int,
        vocab_size: int,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int] = (),
        *,
        end_ids: Iterable[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        for name, ids in (
            ("logit_bias", parameters.logit_bias),
            ("stop_token_ids", parameters.stop_token_ids),
            ("resume_token_ids", generated_ids),
        ):
            _check_ids(name, ids, vocab_size)
        assert max(prompt_ids, default=0) < vocab_size, "Engine.submit has checked the prompt's ids"
        self.parameters = parameters
        self.seed = seed
        self.position = len(generated_ids)
        self.settings = SamplingSettings(parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p)

        # Ids beyond the vocabulary cannot be sampled, so they need no ban. With a constraint its token mask bans them,
        # because a constraint may leave no other token.
        banned = sorted({i for i in (*end_ids, *parameters.stop_token_ids) if i < vocab_size})
        banned = [] if parameters.structured_outputs else banned
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device)
        bias = parameters.logit_bias
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        generated = torch.tensor(list(generated_ids), dtype=torch.int64, device=device)
        if parameters.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True
            self._seen[generated] = True
        if parameters.frequency_penalty or parameters.presence_penalty:
            self._counts = torch.bincount(generated, minlength=vocab_size).float()

    @property
    def is_greedy(self) -> bool:
        return self.parameters.temperature == 0

    @property
    def changes_logits(self) -> bool:
        return self._always_changes or self._bans()

    def is_plain(self, offset: int) -> bool:
        """Whether the token `offset` positions after the next one needs nothing but logits: no changes, no mask, no
        log-probabilities."""
        return (
            not self._always_changes
            and not self._bans(offset)
            and self.parameters.logprobs is None
            and not self.parameters.structured_outputs
        )

    @property
    def _always_changes(self) -> bool:
        return self._seen is not None or self._counts is not None or bool(self.parameters.logit_bias)

    def _bans(self, offset: int = 0) -> bool:
        return self.position + offset < self.parameters.min_tokens and self._banned.numel() > 0

    def append(self, token_id: int) -> None:
        self.position += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        """This sequence's logits (one float32 row) after penalties, bias and ban."""
        parameters = self.parameters
        if self._seen is not None:
            penalty = parameters.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits = logits - self._counts * parameters.frequency_penalty
            logits = logits - (self._counts > 0) * parameters.presence_penalty
        if parameters.logit_bias:
            logits = logits.index_add(0, self._bias_ids, self._biases)
        if self._bans():
            logits = logits.index_fill(0, self._banned, -torch.inf)
        return logits


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    invalid = next((i for i in ids if not 0 <= i < vocab_size), None)
    if invalid is not None:
        raise InvalidRequest(f"{name}: token id {invalid} is outside the vocabulary (0 … {vocab_size - 1})", name)


@dataclass
class PendingTokens:
    """Each row's next token, on the device of its logits. A row is unusable if it holds NaN or no finite logit."""

    ids: torch.Tensor
    _usable: torch.Tensor
    # The rows of these logits that the tokens are sampled from.
    _logits: torch.Tensor
    _rows: Sequence[int]
    _states: Sequence[SamplingState]
    _score: Score
    _masks: TokenMasks | None = None
    # Ids and usability copied to the host, and the event that marks the end of the copy. On a GPU only.
    _host_copy: torch.Tensor | None = None
    _copied: torch.cuda.Event | None = None

    def start_copy(self) -> PendingTokens:
        """On a GPU, start an asynchronous copy of the tokens to the host."""
        if self.ids.device.type == "cuda":
            both = torch.stack((self.ids, self._usable.long()))
            self._host_copy = torch.empty(both.shape, dtype=both.dtype, pin_memory=True).copy_(both, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self.ids.device))
        return self

    def read(self) -> list[Sampled | None]:
        """The tokens, with log-probabilities where they are requested; None for an unusable row."""
        if self._host_copy is not None and self._copied is not None:
            self._copied.synchronize()
            ids, usable = self._host_copy.tolist()
        else:
            ids, usable = self.ids.tolist(), self._usable.tolist()
        scored = [row for row, state in enumerate(self._states) if state.parameters.logprobs is not None]
        logprobs: dict[int, TokenLogprob | None] = {}
        if scored:
            alternatives = [self._states[row].parameters.logprobs or 0 for row in scored]
            rows, own_ids = [self._rows[row] for row in scored], [max(ids[row], 0) for row in scored]
            logits = self._logits
            if self._masks:
                logits, rows = self._masks.take(scored).apply(take_rows(logits, rows).float()), list(range(len(rows)))
            entries = self._score(logits, rows, own_ids, max(alternatives)).entries(own_ids, alternatives)
            if self._masks:
                entries = [entry and _without_impossible(entry) for entry in entries]
            logprobs = dict(zip(scored, entries, strict=True))
        return [Sampled(ids[row], logprobs.get(row)) if usable[row] else None for row in range(len(ids))]


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
    return choose_tokens(logits, states, best, sample_tokens, score, rows, masks).read() if states else []


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
    """Each row's next token, or for plain sequences the token `offset` positions after it."""
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

    changed = [] if offset else [n for n, state in enumerate(states) if state.changes_logits]
    for group in _groups(changed, logits):
        altered = torch.empty(len(group), logits.shape[-1], device=logits.device)
        for row, n in enumerate(group):
            altered[row] = states[n].change(logits[rows[n]].float())
        greedy = Argmax.of(altered)
        tokens[group], usable[group] = greedy.ids, usable[group] & greedy.values.isfinite()
        if altered_rows := [row for row, n in enumerate(group) if n in sampled]:
            members = [group[row] for row in altered_rows]
            tokens[members] = sample_rows(altered, altered_rows, members)
    if plain := sorted(sampled - set(changed)):
        ids = sample_rows(logits, [rows[n] for n in plain], plain)
        if len(plain) == len(states):
            tokens = ids
        else:
            tokens[row_index(plain, tokens.device)] = ids
    if masked:
        usable[masked] &= tokens[masked] >= 0
    return PendingTokens(tokens, usable, logits, rows, states, score, masks)


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
