"""One request inside the engine: what was asked, and how far it has come.

Plain Python. It knows neither tensors nor text: `answer` holds the text's side, `sampling` the sampler's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import Chunk, GenerationRequest, SamplingParameters, TritonLMError
from tritonlm.contract.embedding import Embedding

from .scheduling.blocks import BlockTable

# What goes to the caller: chunks, of which the last has a finish reason, or one error. `last` marks the end.
Item = Chunk | Embedding | TritonLMError
Deliver = Callable[[Item, bool], None]

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    id: str
    prompt_ids: list[int]
    wanted: GenerationRequest
    deliver: Deliver
    # Moments of time.monotonic(); infinity: no limit.
    queue_deadline: float = float("inf")
    deadline: float = float("inf")
    arrived: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))

    # How far it has come. `ids` are the prompt's and the generated ones; the first `computed` are in the cache.
    ids: list[int] = field(init=False)
    computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    cached_tokens: int = 0
    preemptions: int = 0
    started: bool = False
    # What is the same for all tries of it, where steps are written down; how many of them it has come through.
    fingerprint: str = ""
    steps: int = 0
    # It was in a step of a process that died: it is computed without others for so many steps.
    apart_steps: int = 0
    # Its caller does not want it any more: it ends before the next step.
    cancelled: bool = False
    # Moments, each once: its first tokens were computed, its first token was there, its end.
    began: float | None = None
    answered: float | None = None
    ended: float | None = None
    # Prompt tokens whose log-probabilities have been given, when they are wanted.
    scored: int = 0
    # A chunk of it is on its way.
    in_delivery: bool = False
    # Made by the engine when the request is taken in.
    answer: Any = None
    sampling: Any = None
    # Where guesses are wanted: who makes them.
    lookup: Any = None

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids, *self.parameters.resume_token_ids]

    def forget(self) -> None:
        """Let go of the answer: it points back here, and its memory should not wait for the collector of cycles."""
        self.answer = self.sampling = self.lookup = None

    @property
    def parameters(self) -> SamplingParameters:
        return self.wanted.parameters

    @property
    def started_answering(self) -> bool:
        return self.answered is not None

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: by priority, then by arrival."""
        return (self.parameters.priority, self.number)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet: 1 while decoding, more while the prompt is being read."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.prompt_ids)

    @property
    def ends_next(self) -> bool:
        """Whether its next token is the last one it may have."""
        return self.generated + 1 >= (self.parameters.max_tokens or 0)

    @property
    def needs_every_row(self) -> bool:
        """Whether something is still wanted of every token of the prompt: then all of them have to be computed."""
        return self.embeds or (self.scores_prompt and self.scored < len(self.prompt_ids) - 1)

    @property
    def embeds(self) -> bool:
        """Whether the prompt's embedding is wanted, and no tokens."""
        return self.wanted.embed

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted; whoever goes on after an earlier try has had them."""
        wanted = self.parameters
        return wanted.echo and wanted.logprobs is not None and not wanted.resume_token_ids
