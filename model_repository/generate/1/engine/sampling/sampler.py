"""From a batch of logits to each sequence's next token, with log-probabilities where they were asked for.

The order: repetition, frequency and presence penalty, bias, ban of the end before min_tokens, then greedy choice or
temperature, top-k, top-p, min-p and one draw. A draw is a function of (seed, choice, position). It does not know
where logits come from, how sequences are scheduled, nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract.chunk import TokenLogprob
from tritonlm.contract.errors import InvalidRequest
from tritonlm.contract.parameters import SamplingParameters

from .logit_filters import DrawSettings, uniform
from .logit_filters import draw as draw_by_torch
from .logprobs import Score
from .logprobs import score as score_by_torch
from .scratch import SCRATCH_BYTES, rows_at_once

__all__ = ["Sampled", "SamplingState", "sample", "uniform"]

# Of each number of a changed row, as float32: changed rows have half of the scratch, and drawing has the other half.
_CHANGED_BYTES = 4

# One token id for each of these rows of logits, as logit_filters.draw gives it.
Draw = Callable[[torch.Tensor, Sequence[DrawSettings], npt.NDArray[np.float64], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class Best:
    """The largest number of each row of logits, NaN where one of them is, and whose it is."""

    values: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Best:
        return cls(*logits.max(dim=-1))

    def rows(self, rows: Sequence[int]) -> Best:
        return Best(self.values[list(rows)], self.ids[list(rows)])


class SamplingState:
    """What sampling has to remember of one sequence: its parameters, its position, the tokens it counts."""

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
        assert max(prompt_ids, default=0) < vocab_size, "the prompt's ids were checked when it came in"
        self.parameters = parameters
        self.seed = seed
        self.position = len(generated_ids)
        self.settings = DrawSettings(parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p)

        # What the model's head cannot give needs no ban.
        banned = sorted({i for i in (*end_ids, *parameters.stop_token_ids) if i < vocab_size})
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

    def is_plain(self, ahead: int) -> bool:
        """Whether its token, so many after the next one, is chosen by plain logits, and nothing told of it."""
        return not self._always_changes and not self._bans(ahead) and self.parameters.logprobs is None

    @property
    def _always_changes(self) -> bool:
        return self._seen is not None or self._counts is not None or bool(self.parameters.logit_bias)

    def _bans(self, ahead: int = 0) -> bool:
        return self.position + ahead < self.parameters.min_tokens and self._banned.numel() > 0

    def append(self, token_id: int) -> None:
        self.position += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        """This sequence's logits (one float32 row) after penalties, bias and ban."""
        wanted = self.parameters
        if self._seen is not None:
            penalty = wanted.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits = logits - self._counts * wanted.frequency_penalty - (self._counts > 0) * wanted.presence_penalty
        if wanted.logit_bias:
            logits = logits.index_add(0, self._bias_ids, self._biases)
        if self._bans():
            logits = logits.index_fill(0, self._banned, -torch.inf)
        return logits


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"{name}: token id {wrong} is outside the vocabulary (0 … {vocab_size - 1})", name)


@dataclass
class Chosen:
    """Each row's next token, where its logits are; unusable ones hold NaN, or no finite best."""

    ids: torch.Tensor
    _usable: torch.Tensor
    # Which rows of these.
    _logits: torch.Tensor
    _rows: Sequence[int]
    _states: Sequence[SamplingState]
    _score: Score
    # Both, on their way here from a GPU, and when they have come.
    _here: torch.Tensor | None = None
    _came: torch.cuda.Event | None = None

    def on_its_way(self) -> Chosen:
        """Begin to bring what a GPU has chosen, which goes on meanwhile."""
        if self.ids.device.type == "cuda":
            both = torch.stack((self.ids, self._usable.long()))
            self._here = torch.empty(both.shape, dtype=both.dtype, pin_memory=True).copy_(both, non_blocking=True)
            self._came = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._came.record(torch.cuda.current_stream(self.ids.device))
        return self

    def read(self) -> list[Sampled | None]:
        """The tokens, with log-probabilities where they were asked for; None where a row allows none."""
        if self._here is not None and self._came is not None:
            self._came.synchronize()
            ids, good = self._here.tolist()
        else:
            ids, good = self.ids.tolist(), self._usable.tolist()
        scored = [row for row, state in enumerate(self._states) if state.parameters.logprobs is not None]
        logprobs: dict[int, TokenLogprob | None] = {}
        if scored:
            alternatives = [self._states[row].parameters.logprobs or 0 for row in scored]
            of_rows, own = [self._rows[row] for row in scored], [ids[row] for row in scored]
            found = self._score(self._logits, of_rows, own, max(alternatives)).entries(own, alternatives)
            logprobs = dict(zip(scored, found, strict=True))
        return [Sampled(ids[row], logprobs.get(row)) if good[row] else None for row in range(len(ids))]


def sample(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    best: Best | None = None,
    draw: Draw = draw_by_torch,
    score: Score = score_by_torch,
    rows: Sequence[int] | None = None,
) -> list[Sampled | None]:
    """The next token by each of these rows, or by all. None where its logits allow none: they hold NaN, or no finite
    best."""
    return choose(logits, states, best, draw, score, rows).read() if states else []


def choose(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    best: Best | None,
    draw: Draw,
    score: Score,
    rows: Sequence[int] | None = None,
    ahead: int = 0,
) -> Chosen:
    """Each row's next token; or, of plain sequences, the one so many `ahead` of it."""
    every = rows is None or list(rows) == list(range(len(logits)))
    rows = range(len(logits)) if rows is None else rows
    assert len(rows) == len(states), "one row of logits for each sequence"
    best = best or Best.of(logits)
    best = best if every else best.rows(rows)
    tokens, usable = best.ids.clone(), best.values.isfinite()
    changed = [] if ahead else [n for n, state in enumerate(states) if state.changes_logits]
    for some in _groups(changed, logits):
        altered = torch.empty(len(some), logits.shape[-1], device=logits.device)
        for place, n in enumerate(some):
            altered[place] = states[n].change(logits[rows[n]].float())
        found = Best.of(altered)
        tokens[some], usable[some] = found.ids, usable[some] & found.values.isfinite()
        drawn = [place for place, n in enumerate(some) if not states[n].is_greedy]
        if drawn:
            theirs = [some[place] for place in drawn]
            tokens[theirs] = _draw_rows(altered, drawn, [states[n] for n in theirs], draw, ahead)
    plain = [n for n in range(len(states)) if not states[n].is_greedy and n not in set(changed)]
    if plain:
        ids = _draw_rows(logits, [rows[n] for n in plain], [states[n] for n in plain], draw, ahead)
        if len(plain) == len(states):
            tokens = ids
        else:
            tokens[plain] = ids
    return Chosen(tokens, usable, logits, rows, states, score)


def _groups(numbers: Sequence[int], logits: torch.Tensor) -> Iterator[list[int]]:
    """As many at a time as a copy of their rows fits into the scratch."""
    step = rows_at_once(_CHANGED_BYTES * logits.shape[-1], SCRATCH_BYTES // 2)
    return (list(numbers[n : n + step]) for n in range(0, len(numbers), step))


def _draw_rows(
    logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState], draw: Draw, ahead: int
) -> torch.Tensor:
    uniforms = uniform(
        [state.seed for state in states],
        [state.parameters.choice for state in states],
        [state.position + ahead for state in states],
    )
    return draw(logits, [state.settings for state in states], uniforms, rows)
