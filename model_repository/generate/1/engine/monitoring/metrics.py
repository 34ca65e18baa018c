"""What an engine counts and times: the list of its measures, and their values.

The engine's thread writes, another one reads: numbers are single writes, and what was timed waits in bounded queues
until it is taken. It does not know where the values go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
PREFIX = "tritonlm_engine_"
# Of what was timed between two readings at most so many are kept.
_KEPT = 2000
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class Measure:
    name: str
    kind: str
    meaning: str
    buckets: tuple[float, ...] = ()

    @property
    def published_name(self) -> str:
        return f"{PREFIX}{self.name}_total" if self.kind == COUNTER else PREFIX + self.name


QUEUE_SECONDS, PREFILL_SECONDS, DECODE_SECONDS = "queue_seconds", "prefill_seconds", "decode_seconds"
STEP_SECONDS, STEP_SEQUENCES = "step_seconds", "step_sequences"

# What the engine itself counts up.
COUNTED = (
    Measure("requests", COUNTER, "Requests that came in"),
    Measure("finished", COUNTER, "Requests that ended by themselves: end of text, stop string, length"),
    Measure("cancelled", COUNTER, "Requests that were cancelled"),
    Measure("timed_out", COUNTER, "Requests whose time was up, while they waited or ran"),
    Measure("failed", COUNTER, "Requests that ended with an error"),
    Measure("refused", COUNTER, "Requests that were refused: the queue was full, or the engine was stopping"),
    Measure("steps", COUNTER, "Steps: each computes all running requests together"),
    Measure(STEP_SECONDS, COUNTER, "Time spent in steps; by steps: the time of one"),
    Measure(
        "slow_steps",
        COUNTER,
        "Of those, the ones that took longer than two seconds: the machine is slow, or has too much to do",
    ),
    Measure(STEP_SEQUENCES, COUNTER, "Requests in steps; by steps: the size of a batch"),
    Measure("prompt_tokens", COUNTER, "Tokens of prompts that were computed"),
    Measure("generated_tokens", COUNTER, "Tokens that were generated"),
    Measure("guessed_tokens", COUNTER, "Tokens that were guessed ahead, where guesses are wanted"),
    Measure("rightly_guessed_tokens", COUNTER, "Of those, the ones that were then drawn"),
    Measure("cached_tokens", COUNTER, "Tokens of prompts that were found in the prefix cache"),
)
# What is known elsewhere in the engine at any moment.
LOOKED_AT = (
    Measure("preemptions", COUNTER, "Times that a request gave its KV blocks back to another"),
    Measure("running", GAUGE, "Requests that run"),
    Measure("waiting", GAUGE, "Requests that wait for a place"),
    Measure("places", GAUGE, "Requests that can run together"),
    Measure("kv_blocks", GAUGE, "Blocks of the KV cache"),
    Measure("kv_blocks_used", GAUGE, "Blocks that running requests hold"),
    Measure("kv_blocks_idle", GAUGE, "Blocks that nobody holds and that the prefix cache still knows"),
    Measure("memory_bytes", GAUGE, "Memory that the engine takes now: resident, or on a GPU what torch has"),
    Measure("memory_reserved_bytes", GAUGE, "Memory that it may take at most: weights, process and the whole KV cache"),
)
TIMED = (
    Measure(QUEUE_SECONDS, HISTOGRAM, "From a request's arrival until its first tokens were computed", _SECONDS),
    Measure(PREFILL_SECONDS, HISTOGRAM, "From then until its first token was there", _SECONDS),
    Measure(DECODE_SECONDS, HISTOGRAM, "From its first token to its end", _SECONDS),
)
MEASURES = (*COUNTED, *LOOKED_AT, *TIMED)


class Rate:
    """How much there was in each of the last seconds."""

    def __init__(self, seconds: int = 5) -> None:
        # By the second: which one it is, and how much there was in it.
        self._slots = [(0, 0.0)] * (seconds + 1)
        self._seconds = seconds

    def add(self, amount: float, now: float) -> None:
        second = int(now)
        place = second % len(self._slots)
        kept, before = self._slots[place]
        self._slots[place] = (second, before + amount if kept == second else amount)

    def each_second(self, now: float) -> float:
        """On average over the last whole seconds."""
        last = int(now) - 1
        return sum(amount for second, amount in self._slots if 0 <= last - second < self._seconds) / self._seconds


class Metrics:
    """One engine's own values."""

    def __init__(self) -> None:
        self.generated = Rate()
        self.counted: dict[str, float] = {measure.name: 0 for measure in COUNTED}
        self._timed: dict[str, deque[float]] = {measure.name: deque(maxlen=_KEPT) for measure in TIMED}

    def count(self, name: str, amount: float = 1) -> None:
        self.counted[name] += amount

    def time(self, name: str, seconds: float) -> None:
        self._timed[name].append(seconds)

    def take_timed(self) -> dict[str, list[float]]:
        """What was timed since the last taking; for one reader."""
        return {name: _drain(found) for name, found in self._timed.items()}


def _drain(found: deque[float]) -> list[float]:
    return [found.popleft() for _ in range(len(found))]


def added(values: Iterable[dict[str, float]]) -> dict[str, float]:
    """The values of several engines as one."""
    total: dict[str, float] = {}
    for each in values:
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    return total
