"""The limits of a checkpoint for a request: the ids of its vocabulary and the tokens of its context.

Plain Python. It knows numbers, and neither text nor tensors.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tritonlm.contract import (
    Checkpoint,
    CheckpointError,
    ContextLengthExceeded,
    InvalidRequest,
    SamplingParameters,
)

DEFAULT_MAX_TOKENS = 16
# The engine's settings that may lower the context: a sequence must fit into the KV cache, too.
CONTEXT_SETTINGS = ("max_context_tokens", "kv_cache_tokens")


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    context: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, settings: Mapping[str, str], environment: Mapping[str, str] = os.environ
    ) -> Limits:
        """The checkpoint's own limits. The model's config or the environment may lower the context."""
        limits = [limit for name in CONTEXT_SETTINGS if (limit := _configured(name, settings, environment))]
        return cls(checkpoint.vocab_size, min([checkpoint.context_length, *limits]))

    def check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest.for_token(param, token_id, self.vocab_size)

    def complete(
        self, parameters: SamplingParameters, prompt_tokens: int, *, is_chat: bool = False
    ) -> SamplingParameters:
        """Check the parameters against model and prompt, and set defaults for `max_tokens` and `seed`."""
        self.check_vocabulary(parameters.logit_bias, "logit_bias")
        self.check_vocabulary(parameters.stop_token_ids, "stop_token_ids")
        self.check_vocabulary(parameters.resume_token_ids, "resume_token_ids")
        max_tokens = self._max_tokens(parameters.max_tokens, prompt_tokens, is_chat)
        resumed = len(parameters.resume_token_ids)
        if resumed and resumed >= max_tokens:
            raise InvalidRequest(
                f"resume_token_ids holds {resumed} tokens and max_tokens is {max_tokens}: nothing is left to generate; "
                "send the max_tokens of the first attempt",
                "resume_token_ids",
            )
        # Chosen here, so that everything after this is a function of the request.
        seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
        return replace(parameters, max_tokens=max_tokens, seed=seed)

    def _max_tokens(self, requested: int | None, prompt_tokens: int, is_chat: bool) -> int:
        free = self.context - prompt_tokens
        # At least one, so that the error below names a positive number.
        default = max(1, free if is_chat else min(DEFAULT_MAX_TOKENS, free))
        max_tokens = default if requested is None else requested
        if max_tokens > free:
            raise ContextLengthExceeded.for_lengths(self.context, prompt_tokens, max_tokens)
        return max_tokens


def _configured(name: str, settings: Mapping[str, str], environment: Mapping[str, str]) -> int:
    """The value of a setting; 0: it sets no limit."""
    source, text = f"config.pbtxt parameter {name}", settings.get(name)
    if not text:
        source = f"TRITONLM_{name.upper()}"
        text = environment.get(source) or "0"
    if not (text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{source} must be a number of at least 0 (got {text!r})")
    return int(text)
