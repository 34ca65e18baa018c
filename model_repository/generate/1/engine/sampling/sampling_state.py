"""The sampling state of one sequence: its parameters, its position, and what its penalties, bias and bans do to logits.

It knows one row of logits, and neither batches nor how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tritonlm.contract.parameters import SamplingParameters

from .logit_filters import SamplingSettings
from .transfer import row_index


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
        """All ids but the `end_ids` are in the vocabulary: `Intake.submit` has checked them."""
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
        # Tokens that are counted and not yet appended.
        self._counted_before = 0
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
    def is_plain(self) -> bool:
        """Whether its next token is chosen from the logits as they are, and none of them is returned."""
        return self.parameters.logprobs is None and not self.changes_logits()

    @property
    def counts_tokens(self) -> bool:
        """Whether its logits depend on the tokens before: it has penalties."""
        return self._seen is not None or self._counts is not None

    def changes_logits(self, offset: int = 0) -> bool:
        """Whether it changes the logits of the token `offset` positions after the next one."""
        return self.counts_tokens or bool(self.parameters.logit_bias) or self._bans(offset)

    def _bans(self, offset: int = 0) -> bool:
        return self.position + offset < self.parameters.min_tokens and self._banned.numel() > 0

    def append(self, token_id: int) -> None:
        """Go on to the next position. The token counts, unless `count` has counted it."""
        self.position += 1
        if self._counted_before:
            self._counted_before -= 1
        elif self.counts_tokens:
            self._count(row_index([token_id], self._banned.device))

    def count(self, token_id: torch.Tensor) -> None:
        """Count the next token (a tensor of one element), which is on the device and not yet appended."""
        if self.counts_tokens:
            self._counted_before += 1
            self._count(token_id)

    def _count(self, token_id: torch.Tensor) -> None:
        if self._seen is not None:
            self._seen.index_fill_(0, token_id, True)
        if self._counts is not None:
            self._counts.index_add_(0, token_id, self._counts.new_ones(1))

    def change(self, logits: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """This sequence's logits (one float32 row) of the token `offset` positions after the next one, after penalties,
        bias and ban. The tokens before it have been counted."""
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
        if self._bans(offset):
            logits = logits.index_fill(0, self._banned, -torch.inf)
        return logits
