"""Checks, before anything is loaded, that a planned model fits into this machine's memory. It reads no data."""

from __future__ import annotations

import psutil

from .errors import TrainingError
from .plan import TrainingPlan

# A weight, its gradient and the optimizer's two moments, in float32.
_BYTES_PER_PARAMETER = 16
# The longest rows of the built-in data; rows of other data fill the context.
_LONGEST_ROWS = {"abacus": 16, "fable": 160}


def check_memory(plan: TrainingPlan) -> None:
    """Raise TrainingError when a model from scratch, or a step of it, needs more memory than is available."""
    if plan.model is not None:
        return
    available = psutil.virtual_memory().available
    weights, batch = _parameters(plan) * _BYTES_PER_PARAMETER, _logits_bytes(plan)
    if weights > available:
        raise TrainingError(
            f"sizes: a model of {_parameters(plan):,} parameters needs {_gib(weights)} to train, {_gib(available)} are "
            "free; use fewer layers or a smaller width"
        )
    if weights + batch > available:
        raise TrainingError(
            f"batch_size: a step of {plan.batch_size:,} sequences needs {_gib(weights + batch)} at least, "
            f"{_gib(available)} are free; use a smaller batch"
        )


def _parameters(plan: TrainingPlan) -> int:
    sizes = plan.sizes
    return 12 * sizes.layers * sizes.width**2 + (plan.vocabulary + sizes.context) * sizes.width


def _logits_bytes(plan: TrainingPlan) -> int:
    """The largest tensors of a step: the logits of each token and their gradient."""
    vocabulary = 32 if plan.data == "abacus" else plan.vocabulary
    row = min(plan.sizes.context, _LONGEST_ROWS.get(plan.data, plan.sizes.context))
    return plan.batch_size * row * vocabulary * 4 * 2


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
