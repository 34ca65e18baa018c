"""Generates prompts with realistic lengths. It knows no server.

Lengths are in words; a word is one or two tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

_TEXT = (
    "the fox and a lantern went over the hill where an old river told the moon that every star had been "
    "asleep since summer while the small boat waited near the mill with bread and honey for the miller "
    "and his quiet daughter"
)
_WORDS = _TEXT.split()
# Together, prompt and output fit into fable's context.
_MAX_PROMPT_WORDS, _MAX_OUTPUT_TOKENS = 200, 150
_SHARED = " ".join(_WORDS * 8)


@dataclass(frozen=True)
class Prompt:
    """One request: a text or a chat, and the maximum number of output tokens."""

    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    tokens: int = 64


def _text(words: int, rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _log_normal(median: float, spread: float, most: int, rng: random.Random) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), spread))))


@dataclass
class PromptSource:
    """Generates the successive prompts of one user."""

    rng: random.Random
    history: list[dict[str, str]] = field(default_factory=list)

    def fixed(self) -> Prompt:
        """Fixed lengths: 32 words in, 64 tokens out."""
        return Prompt(_text(32, self.rng), tokens=64)

    def log_normal(self) -> Prompt:
        """Log-normal lengths: most are short, some are long."""
        return Prompt(
            _text(_log_normal(40, 0.8, _MAX_PROMPT_WORDS, self.rng), self.rng),
            tokens=_log_normal(48, 0.6, _MAX_OUTPUT_TOKENS, self.rng),
        )

    def shared_prefix(self) -> Prompt:
        """All prompts share a long prefix, such as system instructions or a document."""
        return Prompt(f"{_SHARED} {_text(8, self.rng)}", tokens=32)

    def chat(self) -> Prompt:
        """A conversation that grows, and starts again when it has become long."""
        if sum(len(message["content"].split()) for message in self.history) > _MAX_PROMPT_WORDS:
            self.history.clear()
        message = f"Tell me a story about a {self.rng.choice(('fox', 'boat', 'mill'))} and a lantern"
        self.history.append({"role": "user", "content": message})
        return Prompt(messages=tuple(self.history), tokens=96)

    def add_answer(self, answer: str) -> None:
        """Add the model's answer to the conversation."""
        if self.history:
            self.history.append({"role": "assistant", "content": answer})


KINDS: dict[str, Callable[[PromptSource], Prompt]] = {
    "fixed": PromptSource.fixed,
    "log-normal": PromptSource.log_normal,
    "shared-prefix": PromptSource.shared_prefix,
    "chat": PromptSource.chat,
}
