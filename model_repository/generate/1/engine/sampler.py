"""From a batch of logits to each sequence's next token, with log-probabilities where they were asked for.

The order: repetition, frequency and presence penalty, bias, ban of the end before min_tokens, then greedy choice or
temperature, top-k, top-p, min-p and one draw. A draw is a function of (seed, choice, position). It does not know
where logits come from, how sequences are scheduled, nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract.chunk import TokenLogprob
from tritonlm.contract.errors import InvalidRequest
from tritonlm.contract.parameters import SamplingParameters

from .logit_filters import FULL_WEIGHT, DrawSettings, softmax_weights, uniform
from .logit_filters import draw as draw_by_torch

__all__ = ["Sampled", "SamplingState", "sample", "score_prompt", "uniform"]

# Log-probabilities need several 64-bit copies of the logits: no more rows at a time than this.
SCORED_ROWS = 32


# One token id per row, as logit_filters.draw gives it.
Draw = Callable[[torch.Tensor, Sequence[DrawSettings], npt.NDArray[np.float64]], torch.Tensor]


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
        return Best(self.values[rows], self.ids[rows])


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
    _logits: torch.Tensor
    _states: Sequence[SamplingState]
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
            found = _score(self._logits[scored], [ids[row] for row in scored], alternatives)
            logprobs = dict(zip(scored, found, strict=True))
        return [Sampled(ids[row], logprobs.get(row)) if good[row] else None for row in range(len(ids))]


def sample(
    logits: torch.Tensor, states: Sequence[SamplingState], best: Best | None = None, draw: Draw = draw_by_torch
) -> list[Sampled | None]:
    """Each row's next token. None where a row's logits allow none: they hold NaN, or no finite best."""
    return choose(logits, states, best, draw).read() if states else []


def choose(
    logits: torch.Tensor, states: Sequence[SamplingState], best: Best | None, draw: Draw, ahead: int = 0
) -> Chosen:
    """Each row's next token; or, of plain sequences, the one so many `ahead` of it."""
    assert logits.shape[0] == len(states), "one row of logits for each sequence"
    best = best or Best.of(logits)
    tokens, usable, raw = best.ids, best.values.isfinite(), logits
    changed = [] if ahead else [row for row, state in enumerate(states) if state.changes_logits]
    drawn = [row for row, state in enumerate(states) if not state.is_greedy]
    if changed:
        logits = logits.float().clone()
        for row in changed:
            logits[row] = states[row].change(logits[row])
        best = Best.of(logits)
        tokens, usable = best.ids, usable & best.values.isfinite()
    if drawn:
        rows = logits if len(drawn) == len(states) else logits[drawn]
        tokens[drawn] = _draw_rows(rows.float(), [states[row] for row in drawn], draw, ahead)
    return Chosen(tokens, usable, raw, states)


def _draw_rows(logits: torch.Tensor, states: Sequence[SamplingState], draw: Draw, ahead: int) -> torch.Tensor:
    uniforms = uniform(
        [state.seed for state in states],
        [state.parameters.choice for state in states],
        [state.position + ahead for state in states],
    )
    # A row that allows no token is refused by the caller; until then it must not disturb the arithmetic. Whether there
    # is one cannot be asked of a GPU without waiting for it.
    unusable = ~logits.amax(dim=-1, keepdim=True).isfinite()
    if logits.device.type != "cpu" or bool(unusable.any()):
        logits = logits.masked_fill(unusable, 0.0)
    return draw(logits, [state.settings for state in states], uniforms)


def score_prompt(logits: torch.Tensor, next_ids: Sequence[int], alternatives: int) -> list[TokenLogprob | None]:
    """The log-probability of each given next token with the row's best alternatives; None for an unusable row."""
    assert logits.shape[0] == len(next_ids), "one next token for each row of logits"
    return _score(logits, next_ids, [alternatives] * len(next_ids))


def _score(logits: torch.Tensor, ids: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob | None]:
    scores: list[TokenLogprob | None] = []
    for start in range(0, len(ids), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        scores += _score_rows(logits[part].float(), ids[part], alternatives[part])
    return scores


def _score_rows(logits: torch.Tensor, ids: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob | None]:
    best = logits.amax(dim=-1, keepdim=True)
    usable: list[bool] = best.isfinite()[:, 0].tolist()
    total = softmax_weights(logits).sum(dim=-1, keepdim=True).double() / FULL_WEIGHT
    # The whole row first: a token's own entry and its entry among the best are then one and the same float.
    logprobs = (logits.double() - best.double() - total.log()).float()
    own: list[float] = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    top_ids = _best_ids(logits, max(alternatives))
    tops: list[list[float]] = logprobs.gather(1, top_ids).tolist()
    rows = zip(ids, own, top_ids.tolist(), tops, alternatives, usable, strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(best_ids[:count], values[:count], strict=True))) if good else None
        for token_id, logprob, best_ids, values, count, good in rows
    ]


def _best_ids(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the best, in order. Equals by id: the logits' order and the id make one integer, unlike any other."""
    bits = (logits + 0.0).contiguous().view(torch.int32).to(torch.int64)  # + 0.0: there is one zero, not two
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return (order * 2**32 - ids).topk(min(count, logits.shape[-1])).indices
