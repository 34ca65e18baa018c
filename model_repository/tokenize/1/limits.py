"""What a checkpoint allows of a request: ids of its vocabulary, and as many tokens as its context holds.

Plain Python. It knows numbers, neither text nor tensors.
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
CONTEXT_SETTING = "max_context_tokens"
CONTEXT_VARIABLE = "TRITONLM_MAX_CONTEXT_TOKENS"


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    context: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, settings: Mapping[str, str], environment: Mapping[str, str] = os.environ
    ) -> Limits:
        """The checkpoint's own limits; the context may be lowered by the model's config or the environment."""
        lowered = _lowered_context(settings, environment)
        context = min(lowered, checkpoint.context_length) if lowered else checkpoint.context_length
        return cls(checkpoint.vocab_size, context)

    def check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"{param} holds the token id {token_id}, which is outside this model's vocabulary: "
                    f"0 to {self.vocab_size - 1}",
                    param,
                )

    def settle(
        self, parameters: SamplingParameters, prompt_tokens: int, *, is_chat: bool = False
    ) -> SamplingParameters:
        """The parameters with nothing left open (`max_tokens`, `seed`), once they fit this model and prompt."""
        self.check_vocabulary(parameters.logit_bias, "logit_bias")
        self.check_vocabulary(parameters.stop_token_ids, "stop_token_ids")
        self.check_vocabulary(parameters.resume_token_ids, "resume_token_ids")
        max_tokens = self._max_tokens(parameters.max_tokens, prompt_tokens, is_chat)
        resumed = len(parameters.resume_token_ids)
        if resumed and resumed >= max_tokens:
            raise InvalidRequest(
                f"resume_token_ids holds {resumed} tokens and max_tokens is {max_tokens}: nothing is left to generate; "
                "send the max_tokens of the first try",
                "resume_token_ids",
            )
        # Drawn here, so that all that follows is a function of the request.
        seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
        return replace(parameters, max_tokens=max_tokens, seed=seed)

    def _max_tokens(self, asked: int | None, prompt_tokens: int, is_chat: bool) -> int:
        free = self.context - prompt_tokens
        # At least one token, if only so that the refusal has something to name.
        default = max(1, free if is_chat else min(DEFAULT_MAX_TOKENS, free))
        wanted = default if asked is None else asked
        if wanted > free:
            raise ContextLengthExceeded.of(self.context, prompt_tokens, wanted)
        return wanted


def _lowered_context(settings: Mapping[str, str], environment: Mapping[str, str]) -> int:
    """0: as the checkpoint says."""
    source, text = f"config.pbtxt parameter {CONTEXT_SETTING}", settings.get(CONTEXT_SETTING)
    if not text:
        source, text = CONTEXT_VARIABLE, environment.get(CONTEXT_VARIABLE) or "0"
    if not (text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{source} must be a number of at least 0 (got {text!r})")
    return int(text)
