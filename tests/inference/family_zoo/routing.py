"""Token ids for which a mixture of experts chooses clearly. Where two scores are close, bfloat16 may choose otherwise.

A model without routers gets any ids.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

# Between the last expert that is chosen and the first that is not, relative to the spread of the scores.
_MARGIN = 0.2
_CANDIDATES = 16


def clear_ids(model: Any, seed: int, lengths: Sequence[int], vocabulary: range) -> list[list[int]]:
    """Ids for a sequence of each length."""
    generator = random.Random(seed)
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    if not routers:
        return [generator.choices(vocabulary, k=length) for length in lengths]
    # All sequences grow together, and then are cut.
    ids: list[list[int]] = [[] for _ in lengths]
    # Of the ids so far, once for each candidate of each sequence.
    cache = DynamicCache(config=model.config)
    while len(ids[0]) < max(lengths):
        candidates = [generator.sample(vocabulary, _CANDIDATES) for _ in lengths]
        tried = copy.deepcopy(cache)
        clear = _margins(model, routers, torch.tensor(candidates).flatten(), tried).view(len(ids), -1) > _MARGIN
        if clear.any(1).all():
            chosen = clear.int().argmax(1)
            for sequence, some, index in zip(ids, candidates, chosen.tolist(), strict=True):
                sequence.append(some[index])
            rows = torch.arange(len(ids)) * _CANDIDATES + chosen
            cache = tried
            cache.batch_select_indices(rows.repeat_interleave(_CANDIDATES))
    return [sequence[:length] for sequence, length in zip(ids, lengths, strict=True)]


def _margins(model: Any, routers: list[Any], candidates: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """The smallest of each candidate in any layer."""
    margins = []

    def measure(router: Any, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        scores = outputs[0].view(len(candidates), outputs[0].shape[-1])
        best = scores.topk(router.top_k + 1).values
        margins.append((best[:, -2] - best[:, -1]) / scores.std())

    hooks = [router.register_forward_hook(measure) for router in routers]
    with torch.no_grad():
        model(candidates[:, None], past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0)
