"""Checks that a model keeps packed examples apart: an example's logits are those that it has alone.

transformers makes the attention mask from the positions, which begin at 0 with each example; some model types ignore
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .errors import TrainingError
from .examples import Examples

# Of the largest logit: rounding of other shapes, in float32 and in 16 bits. Attention to a foreign token is far more.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.05


def check_packing(model: Any, examples: Examples) -> None:
    """Raise TrainingError if an example's logits depend on another one in its row."""
    if examples.positions is None or (bounds := _second_example(examples)) is None:
        return
    row, start, end = bounds
    ids = torch.from_numpy(examples.ids[row, :end].astype(np.int64))[None].to(model.device)
    positions = torch.from_numpy(examples.positions[row, :end].astype(np.int64))[None].to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, start:].float()
            alone = model(input_ids=ids[:, start:], use_cache=False).logits[0].float()
    except TypeError:
        raise TrainingError(f"packing: {model.config.model_type} takes no positions; leave packing out") from None
    finally:
        model.train(was_training)
    difference = float((packed - alone).abs().max() / alone.abs().max())
    if difference > _TOLERANCE.get(model.dtype, _TOLERANCE_16_BITS):
        raise TrainingError(
            f"packing: attention of {model.config.model_type} crosses the examples of a row; leave packing out"
        )


def _second_example(examples: Examples) -> tuple[int, int, int] | None:
    """A row with two examples or more, and the second one's beginning and end in it."""
    assert examples.positions is not None
    for row, length in enumerate(examples.lengths):
        (starts,) = np.nonzero(examples.positions[row, :length] == 0)
        if len(starts) > 1:
            return row, int(starts[1]), int(starts[2]) if len(starts) > 2 else int(length)
    return None
