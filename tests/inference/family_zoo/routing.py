"""Token ids for which a mixture of experts chooses clearly. Where two scores are close, bfloat16 may choose otherwise.

A model without routers gets any ids.
"""

from __future__ import annotations

import random
from typing import Any

import torch

# Between the last expert that is chosen and the first that is not, relative to the spread of the scores.
_MARGIN = 0.2
_CANDIDATES = 16


def clear_ids(model: Any, generator: random.Random, length: int, vocabulary: range) -> list[int]:
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    ids: list[int] = []
    while routers and len(ids) < length:
        candidates = generator.sample(vocabulary, _CANDIDATES)
        margins = _margins(model, routers, [[*ids, candidate] for candidate in candidates])
        ids += [candidate for candidate, margin in zip(candidates, margins, strict=True) if margin > _MARGIN][:1]
    return ids or generator.choices(vocabulary, k=length)


def _margins(model: Any, routers: list[Any], sequences: list[list[int]]) -> list[float]:
    """The smallest of a sequence's last token in any layer."""
    margins = []

    def measure(router: Any, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        scores = outputs[0].view(len(sequences), -1, outputs[0].shape[-1])
        best = scores[:, -1].topk(router.top_k + 1).values
        margins.append((best[:, -2] - best[:, -1]) / scores.std())

    hooks = [router.register_forward_hook(measure) for router in routers]
    with torch.no_grad():
        model(torch.tensor(sequences), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0).tolist()
