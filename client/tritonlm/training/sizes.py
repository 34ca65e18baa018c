"""Whether a planned model fits into this machine's memory, told before anything is loaded. It reads no data."""

from __future__ import annotations

import psutil

from .errors import TrainingError
from .plan import TrainingPlan

# A weight, its gradient and the optimiser's two moments, in float32.
_BYTES_PER_PARAMETER = 16
# The longest rows of the built-in data; others fill the context.
_LONGEST_ROWS = {"abacus": 16, "fable": 160}


def check_it_fits(plan: TrainingPlan) -> None:
    """TrainingError where a model from scratch, or a batch of it, needs more memory than there is."""
    if plan.model is not None:
        return
    available = psutil.virtual_memory().available
    weights, batch = _parameters(plan) * _BYTES_PER_PARAMETER, _logits(plan)
    if weights > available:
        raise TrainingError(
            f"sizes: a model of {_parameters(plan):,} parameters needs {_gib(weights)} to train, {_gib(available)} are "
            "free; take fewer layers or a smaller width"
        )
    if weights + batch > available:
        raise TrainingError(
            f"batch_size: a step of {plan.batch_size:,} sequences needs {_gib(weights + batch)} at least, "
            f"{_gib(available)} are free; take fewer"
        )


def _parameters(plan: TrainingPlan) -> int:
    sizes = plan.sizes
    return 12 * sizes.layers * sizes.width**2 + (plan.vocabulary + sizes.context) * sizes.width


def _logits(plan: TrainingPlan) -> int:
    """What is largest in a step: each token's logits and their gradient."""
    vocabulary = 32 if plan.data == "abacus" else plan.vocabulary
    row = min(plan.sizes.context, _LONGEST_ROWS.get(plan.data, plan.sizes.context))
    return plan.batch_size * row * vocabulary * 4 * 2


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
