"""The workloads of `figures` on transformers' own continuous batching, for comparison."""

from __future__ import annotations

import time
from typing import Any

import random_models
import torch
from random_models import DTYPE, Shape
from stage import Options, Report
from transformers import ContinuousBatchingConfig, GenerationConfig

_LEAST_SECONDS = 15.0
_ATTENTION = "sdpa"


def run(options: Options, report: Report) -> None:
    for shape in random_models.shapes(options):
        model = random_models.make_model(shape.config, DTYPE, torch.device(options.device))
        model.set_attn_implementation(_ATTENTION)
        # The largest batch first: the aim is set for it.
        for batch in reversed(shape.batches):
            if options.left() < _LEAST_SECONDS:
                report(shape=shape.name, batch=batch, skipped="no time left")
                continue
            seconds = _seconds(model, shape, batch, options)
            report(
                shape=shape.name, batch=batch, attention=_ATTENTION, prompt_tokens=shape.prompt_tokens,
                new_tokens=shape.new_tokens, total_tokens_s=round(batch * shape.new_tokens / seconds, 1),
            )  # fmt: skip
        del model
        random_models.release(options.device)


def _seconds(model: Any, shape: Shape, batch: int, options: Options) -> float:
    """The seconds of the second of two runs, so that its graphs are recorded and its memory is allocated."""
    generation = GenerationConfig(max_new_tokens=shape.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    # On a CPU the default sizes are larger than the memory.
    sizes: dict[str, Any] = {} if options.on_gpu else {"num_blocks": 16, "max_batch_tokens": 64, "block_size": 16}
    config = ContinuousBatchingConfig(**sizes)
    prompts = random_models.prompts(shape, batch)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        _generate(manager, prompts, shape.new_tokens)
        began = time.perf_counter()
        _generate(manager, prompts, shape.new_tokens)
        return time.perf_counter() - began


def _generate(manager: Any, prompts: list[list[int]], new_tokens: int) -> None:
    missing = set(manager.add_requests(inputs=prompts, max_new_tokens=new_tokens))
    while missing:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests")
        elif result.is_finished():
            if len(result.generated_tokens) != new_tokens:
                raise RuntimeError(f"{len(result.generated_tokens)} tokens instead of {new_tokens}: {result.error}")
            missing.discard(result.request_id)
