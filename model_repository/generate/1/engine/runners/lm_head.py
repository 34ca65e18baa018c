"""From last hidden states to logits by Hugging Face's own code, after the step that computed the states.

A family may do more than its output layer (soft-capping, scaling). So its whole forward is called once more, with a
decoder that does nothing but return the states. It does not know what the logits are for.
"""

from __future__ import annotations

from typing import Any

import torch


class Head:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder: Any = next((part for part in (model.get_decoder(), model.base_model) if part is not model), None)
        if self._decoder is None:
            raise ValueError("it has no decoder apart from its output layer")
        # What the decoder has computed last, all rows of it: (1, rows, width).
        self.hidden = torch.empty(0)
        # Whether logits can be computed from hidden states; if not, only by a whole forward.
        self.replays = False
        self._decoder.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output[0]

    def check(self, logits: torch.Tensor) -> None:
        """See whether the last hidden states give the logits that the forward made of them."""
        try:
            found = self(self.hidden[0])
        except Exception:  # whatever a foreign forward raises
            return
        same = found.shape == logits.shape[1:] and found.dtype == logits.dtype
        self.replays = same and bool(((found == logits[0]) | (found.isnan() & logits[0].isnan())).all())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of these rows."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions  # noqa: PLC0415

        states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.unsqueeze(0))
        self._decoder.forward = lambda *_, **__: states
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
            return logits[0]
        finally:
            del self._decoder.forward
