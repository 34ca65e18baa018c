"""The LM head: computes logits from last hidden states by Hugging Face's own code, after the step.

A model family may do more than its output layer (soft-capping, scaling). So the whole forward is called again, with a
decoder that only returns the given states. This module does not know what the logits are for.
"""

from __future__ import annotations

from typing import Any

import torch


class LMHead:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder: Any = next((part for part in (model.get_decoder(), model.base_model) if part is not model), None)
        if self._decoder is None:
            raise ValueError("it has no decoder apart from its output layer")
        # The last output of the decoder, all rows: (1, rows, width).
        self.hidden = torch.empty(0)
        # Whether logits can be computed from hidden states. If not, a whole forward is needed.
        self.replays = False
        self._decoder.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output[0]

    def check(self, logits: torch.Tensor) -> None:
        """Check that the last hidden states reproduce these logits of the forward."""
        try:
            replayed = self(self.hidden[0])
        except Exception:  # a foreign forward may raise anything
            return
        same = replayed.shape == logits.shape[1:] and replayed.dtype == logits.dtype
        self.replays = same and bool(((replayed == logits[0]) | (replayed.isnan() & logits[0].isnan())).all())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of these hidden states."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions  # noqa: PLC0415

        states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.unsqueeze(0))
        self._decoder.forward = lambda *_, **__: states
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
            return logits[0]
        finally:
            del self._decoder.forward
