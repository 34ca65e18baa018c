"""Computes log-probabilities from rows of logits: of one given token per row, and of the row's top alternatives.

A row's result depends on that row alone. A token has the same float in its own entry and among the alternatives. The
temporaries are bounded, whatever the number of rows and the vocabulary. This module does not know where logits come
from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tritonlm.contract.chunk import TokenLogprob

from .logit_filters import FULL_WEIGHT, softmax_weights
from .scratch import SCRATCH_BYTES, take_rows
from .transfer import row_index

# Bytes of temporaries per logit of a block: one float32, and two 64-bit numbers at a time.
_NUMBER_BYTES = 24
# On a CPU a block fits into the cache. On a GPU every operation is a kernel launch, so blocks are large.
_BLOCK_BYTES, _GPU_BLOCK_BYTES, _LEAST_WIDTH = 2 << 20, SCRATCH_BYTES // 4, 256
_LOW_BITS = 2**32 - 1


@dataclass(frozen=True)
class Scores:
    """For each row: whether its logits are usable, its token's log-probability, and the top alternatives in order."""

    usable: torch.Tensor
    own: torch.Tensor
    best_ids: torch.Tensor
    best: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        columns = ("usable", "own", "best_ids", "best")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in columns))

    def entries(self, ids: Iterable[int], alternatives: Iterable[int]) -> list[TokenLogprob | None]:
        """One entry per row with the given number of alternatives; None for an unusable row."""
        columns = (self.usable, self.own, self.best_ids, self.best)
        rows = zip(ids, alternatives, *(column.tolist() for column in columns), strict=True)
        return [
            TokenLogprob(token_id, own, tuple(zip(best_ids[:count], best[:count], strict=True))) if usable else None
            for token_id, count, usable, own, best_ids, best in rows
        ]


# Token ids on the host, or on the device of their logits.
Ids = Sequence[int] | torch.Tensor
# Arguments: logits, row indexes, a token id for each row, and the number of alternatives.
Score = Callable[[torch.Tensor, Sequence[int], Ids, int], Scores]


def score(logits: torch.Tensor, rows: Sequence[int], ids: Ids, alternatives: int) -> Scores:
    """All rows together, one block of the vocabulary at a time. Integer sums are exact in any order."""
    assert len(rows) == len(ids), "one token for each row of logits"
    device, vocabulary = logits.device, logits.shape[-1]
    count = min(alternatives, vocabulary)
    best = torch.full((len(rows), 1), -torch.inf, device=device)
    total = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
    top = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    for _, part in _blocks(logits, rows):
        best = torch.maximum(best, part.amax(dim=-1, keepdim=True))
    for first, part in _blocks(logits, rows):
        total += softmax_weights(part, best).sum(dim=-1, keepdim=True)
        if count:
            candidates = torch.cat((top, _order(part, first)), dim=-1)
            top = candidates.topk(min(count, candidates.shape[-1])).values
    log_sum = (total.double() / FULL_WEIGHT).log()
    numbers = row_index(rows, device)[:, None]

    def logprobs(token_ids: torch.Tensor) -> torch.Tensor:
        return (logits[numbers, token_ids].double() - best.double() - log_sum).float()

    top_ids = (-top).bitwise_and_(_LOW_BITS)
    own = logprobs((ids if isinstance(ids, torch.Tensor) else row_index(ids, device))[:, None])
    return Scores(best.isfinite()[:, 0], own[:, 0], top_ids, logprobs(top_ids))


def _blocks(logits: torch.Tensor, rows: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """These rows' logits as float32, in blocks of the vocabulary, each with its first token id."""
    block_bytes = _BLOCK_BYTES if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    width = max(block_bytes // (_NUMBER_BYTES * max(len(rows), 1)), _LEAST_WIDTH)
    for first in range(0, logits.shape[-1], width):
        yield first, take_rows(logits[:, first : first + width], rows).float()


def _order(logits: torch.Tensor, first_id: int) -> torch.Tensor:
    """A unique integer sort key for each logit and its id: ordered by logit, then by descending id. The low bits hold
    the negated id."""
    bits = (logits + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    # Invert all bits of a negative number but its sign, so that integer order is float order.
    bits ^= (bits >> 31).bitwise_and_(_LOW_BITS >> 1)
    ids = torch.arange(first_id, first_id + logits.shape[-1], device=logits.device)
    return bits.to(torch.int64).mul_(_LOW_BITS + 1).sub_(ids)
