"""One request inside the engine: its parameters and how far it is computed.

Plain Python without tensors and text: `output` holds the text, `sampling` holds the sampler's state.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import Chunk, GenerationRequest, SamplingParameters, TritonLMError
from tritonlm.contract.embedding import Embedding

from .adapters.loaded import LoadedAdapter
from .scheduling.blocks import BlockTable, PrefixKey

# What the caller receives: chunks, of which the last has a finish reason, or one error. `last` marks the end.
Item = Chunk | Embedding | TritonLMError
Deliver = Callable[[Item, bool], None]

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    id: str
    prompt_ids: list[int]
    generation: GenerationRequest
    deliver: Deliver
    # Times of time.monotonic(); infinity: no limit.
    queue_deadline: float = float("inf")
    deadline: float = float("inf")
    arrived_at: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))

    # Prompt and generated tokens; the first `computed` of them are in the KV cache.
    ids: list[int] = field(init=False)
    computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    cached_tokens: int = 0
    preemptions: int = 0
    started: bool = False
    # Identifies all attempts of this request in the step journal.
    fingerprint: str = ""
    # Steps of this request that are complete.
    steps: int = 0
    # Steps that still run without other requests, because a process died while it computed this request.
    isolated_steps: int = 0
    # Set by a cancel command. The request ends before the next step.
    cancelled: bool = False
    # Times of its first computed tokens, its first sampled token, and its end.
    prefill_started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    # The next row of the prompt that is scored; it has the log-probability of the token after it.
    scored_tokens: int = field(init=False)
    # Whether one of its chunks waits for delivery.
    in_delivery: bool = False
    # Set before admission: the adapter that it names, and with structured outputs the Constraint; or the error that
    # refuses the request.
    adapter: LoadedAdapter | None = None
    constraint: Any = None
    refusal: TritonLMError | None = None
    # Set by the engine at admission: SequenceOutput or PooledPrompt, SamplingState, and PromptLookup (if enabled).
    output: Any = None
    sampling: Any = None
    prompt_lookup: Any = None

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids, *self.parameters.resume_token_ids]
        self.scored_tokens = max(0, min(self.parameters.logprobs_start, len(self.prompt_ids)) - 1)

    def drop_state(self) -> None:
        """Break the reference cycles, so that its memory does not wait for the garbage collector.

        They go through `output`, and through the traceback of a `refusal`. Nor does the memory of an adapter wait,
        which may be evicted now.
        """
        self.output = self.sampling = self.prompt_lookup = None
        self.constraint = self.adapter = self.refusal = None

    @property
    def parameters(self) -> SamplingParameters:
        return self.generation.parameters

    @property
    def prefix_key(self) -> PrefixKey:
        """Requests of the same key share their prefixes' blocks."""
        return (self.adapter.identity if self.adapter else "", self.parameters.cache_salt)

    @property
    def has_first_token(self) -> bool:
        return self.first_token_at is not None

    @property
    def rank(self) -> tuple[int, int]:
        """Lower runs first: by priority, then by arrival."""
        return (self.parameters.priority, self.number)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the KV cache yet: 1 while decoding, more during prefill."""
        return len(self.ids) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next step samples one token, or goes on after tokens that its grammar forced."""
        return self.remaining == 1 or (self.generated > 0 and self.computed >= len(self.prompt_ids))

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.prompt_ids)

    @property
    def ends_next(self) -> bool:
        """Whether its next token reaches max_tokens."""
        return self.generated + 1 >= (self.parameters.max_tokens or 0)

    @property
    def needs_every_row(self) -> bool:
        """Whether the hidden states of all prompt tokens are needed, for an embedding or for log-probabilities."""
        return self.embeds or (self.scores_prompt and self.scored_tokens < len(self.prompt_ids) - 1)

    @property
    def reusable_ids(self) -> list[int]:
        """Its first tokens, as far as the prefix cache may hold them: a row that is needed has to be computed."""
        if self.embeds:
            return []
        return self.ids[: self.scored_tokens + 1] if self.needs_every_row else self.ids

    @property
    def embeds(self) -> bool:
        """Whether it returns the prompt's embedding and no tokens."""
        return self.generation.embed

    @property
    def scores_prompt(self) -> bool:
        """Whether it returns the prompt's log-probabilities. A resumed request has returned them before."""
        parameters = self.parameters
        return parameters.echo and parameters.logprobs is not None and not parameters.resume_token_ids
