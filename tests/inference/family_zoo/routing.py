"""Token ids for which a mixture of experts chooses clearly. Where two scores are close, bfloat16 may choose otherwise.

A model without routers gets any ids.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from transformers import DynamicCache

# Between the last expert that is chosen and the first that is not, relative to the spread of the scores.
_MARGIN = 0.2
_CANDIDATES = 16


def clear_ids(model: Any, generator: random.Random, length: int, vocabulary: range) -> list[int]:
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    ids: list[int] = []
    # Of the ids so far, once for each candidate.
    cache = DynamicCache(config=model.config)
    while routers and len(ids) < length:
        candidates = generator.sample(vocabulary, _CANDIDATES)
        tried = copy.deepcopy(cache)
        margins = _margins(model, routers, candidates, tried)
        chosen = next((index for index, margin in enumerate(margins) if margin > _MARGIN), None)
        if chosen is not None:
            ids.append(candidates[chosen])
            cache = tried
            cache.batch_select_indices(torch.full((_CANDIDATES,), chosen))
    return ids or generator.choices(vocabulary, k=length)


def _margins(model: Any, routers: list[Any], candidates: list[int], cache: DynamicCache) -> list[float]:
    """The smallest of each candidate in any layer."""
    margins = []

    def measure(router: Any, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        scores = outputs[0].view(len(candidates), outputs[0].shape[-1])
        best = scores.topk(router.top_k + 1).values
        margins.append((best[:, -2] - best[:, -1]) / scores.std())

    hooks = [router.register_forward_hook(measure) for router in routers]
    with torch.no_grad():
        model(torch.tensor(candidates)[:, None], past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0).tolist()
