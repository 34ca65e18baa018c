"""How likely a causal LM finds texts after other texts: the log-probabilities of given tokens after given tokens.

Nothing is sampled. A token's log-probability is a function of the tokens up to it, and does not depend on what else is
computed. It knows completions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonlm.client.sequences import in_timed_parts
from tritonlm.client.types import CachedTokens, Completion, CompletionUsage
from tritonlm.contract import InvalidRequest

if TYPE_CHECKING:
    from tritonlm.client.async_client import AsyncClient

Ids = Sequence[int]


@dataclass(frozen=True)
class Continuation:
    """The tokens whose likelihood is computed, and those before them."""

    prefix: Ids
    tokens: Ids


@dataclass(frozen=True)
class Likelihoods:
    """For each continuation the log-probability of each of its tokens."""

    logprobs: list[list[float]]
    usage: CompletionUsage

    @property
    def sums(self) -> list[float]:
        return [math.fsum(values) for values in self.logprobs]

    @property
    def means(self) -> list[float]:
        return [math.fsum(values) / len(values) for values in self.logprobs]


async def log_likelihoods(
    client: AsyncClient, model: str, continuations: Sequence[Continuation], *, timeout: float, **arguments: Any
) -> Likelihoods:
    """`timeout` is for all of them together. `arguments`: of the completions, such as `priority` and `request_id`."""
    for continuation in continuations:
        if not continuation.prefix or not continuation.tokens:
            raise InvalidRequest("a text without tokens has no likelihood; send text before it and in it", "prompt")
    logprobs: list[list[float]] = []
    prompt = cached = 0
    for part, seconds in in_timed_parts(continuations, timeout):
        # The beginning that they share is computed once: the engine has it in its prefix cache for the others.
        start = min(len(each.prefix) for each in part)
        prompts = [[*each.prefix, *each.tokens] for each in part]
        completion = await client.completions.create(
            model, prompts, echo=True, logprobs=0, logprobs_start=start, max_tokens=0, timeout=seconds, **arguments
        )
        assert isinstance(completion, Completion)
        assert completion.usage is not None
        logprobs += [
            _values(choice.logprobs.token_logprobs if choice.logprobs else [], len(each.tokens))
            for each, choice in zip(part, completion.choices, strict=True)
        ]
        prompt += completion.usage.prompt_tokens
        cached += completion.usage.prompt_tokens_details.cached_tokens
    details = CachedTokens(cached_tokens=cached)
    usage = CompletionUsage(
        prompt_tokens=prompt, completion_tokens=0, total_tokens=prompt, prompt_tokens_details=details
    )
    return Likelihoods(logprobs, usage)


def _values(logprobs: Sequence[float | None], count: int) -> list[float]:
    """The last `count` entries."""
    values = [value for value in logprobs[len(logprobs) - count :] if value is not None]
    assert len(values) == count, "every token but the first has a log-probability"
    return values
