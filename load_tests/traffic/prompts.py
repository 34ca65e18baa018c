"""What is asked: prompts and lengths as they come in life. Plain data; it knows no server.

Lengths are in tokens, or nearly so: a word of these is one or two.
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
# A word is a token, or two; both together fit into the context of fable.
_MOST_PROMPT, _MOST_ANSWER = 200, 150
_SHARED = " ".join(_WORDS * 8)


@dataclass(frozen=True)
class Ask:
    """One request: a text or a chat, and how long the answer may be."""

    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    tokens: int = 64


def _text(words: int, dice: random.Random) -> str:
    return " ".join(dice.choice(_WORDS) for _ in range(words))


def _log_normal(median: float, spread: float, most: int, dice: random.Random) -> int:
    return max(1, min(most, round(dice.lognormvariate(math.log(median), spread))))


@dataclass
class Asker:
    """One person's requests, one after another."""

    dice: random.Random
    history: list[dict[str, str]] = field(default_factory=list)

    def fixed(self) -> Ask:
        """Always as much: 32 in, 64 out."""
        return Ask(_text(32, self.dice), tokens=64)

    def log_normal(self) -> Ask:
        """Most are short, some are long."""
        return Ask(
            _text(_log_normal(40, 0.8, _MOST_PROMPT, self.dice), self.dice),
            tokens=_log_normal(48, 0.6, _MOST_ANSWER, self.dice),
        )

    def shared_prefix(self) -> Ask:
        """All begin alike: a system's instructions, a document that many ask about."""
        return Ask(f"{_SHARED} {_text(8, self.dice)}", tokens=32)

    def chat(self) -> Ask:
        """A conversation that grows, and begins anew when it has become long."""
        if sum(len(message["content"].split()) for message in self.history) > _MOST_PROMPT:
            self.history.clear()
        said = f"Tell me a story about a {self.dice.choice(('fox', 'boat', 'mill'))} and a lantern"
        self.history.append({"role": "user", "content": said})
        return Ask(messages=tuple(self.history), tokens=96)

    def heard(self, answer: str) -> None:
        """What came back belongs to the conversation."""
        if self.history:
            self.history.append({"role": "assistant", "content": answer})


KINDS: dict[str, Callable[[Asker], Ask]] = {
    "fixed": Asker.fixed,
    "log-normal": Asker.log_normal,
    "shared-prefix": Asker.shared_prefix,
    "chat": Asker.chat,
}
