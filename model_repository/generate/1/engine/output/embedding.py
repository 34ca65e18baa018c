"""The embedding of a prompt: the mean of its last hidden states, normalized to length one.

An embedding request has it in place of a SequenceOutput. It sums in float32, slice by slice as the prompt is computed.
It does not know where hidden states come from.
"""

from __future__ import annotations

import torch
from tritonlm.contract import Cancelled, TimedOut, TritonLMError, Usage
from tritonlm.contract.embedding import Embedding

from ..request import Request
from .sequence_output import CANCELLED, TIMEOUT


class PooledPrompt:
    # The interface of SequenceOutput: this one ends with the prompt and never streams.
    finish_reason = ""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._sum: torch.Tensor | None = None

    def add(self, start: int, hidden: torch.Tensor) -> None:
        """Add the hidden states of the tokens from `start` on. After a preemption they start at 0 again."""
        summed = hidden.float().sum(dim=0)
        self._sum = summed if start == 0 or self._sum is None else self._sum + summed

    @property
    def is_finite(self) -> bool:
        return self._sum is not None and bool(self._sum.isfinite().all())

    def chunk(self, due: bool) -> None:
        return None

    def finish(self, reason: str) -> Embedding | TritonLMError:
        if reason == CANCELLED:
            return Cancelled("the request was cancelled")
        if reason == TIMEOUT:
            return TimedOut.of_request()
        assert self._sum is not None
        tokens = len(self._request.prompt_ids)
        vector = torch.nn.functional.normalize(self._sum / tokens, dim=0)
        return Embedding(vector.tolist(), Usage(tokens, 0, 0))
