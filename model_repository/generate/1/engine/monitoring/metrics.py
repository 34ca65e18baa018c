"""The metrics of an engine: their names and descriptions, and the values that it counts and times itself.

The engine's thread writes and another thread reads: counters are single writes, and timings wait in bounded queues
until they are read. This module does not know where the values go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
PREFIX = "tritonlm_engine_"
# At most this many timings are kept between two readings.
_KEPT_TIMINGS = 2000
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class MetricSpec:
    name: str
    kind: str
    description: str
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        return f"{PREFIX}{self.name}_total" if self.kind == COUNTER else PREFIX + self.name


QUEUE_SECONDS, PREFILL_SECONDS, DECODE_SECONDS = "queue_seconds", "prefill_seconds", "decode_seconds"
FORCED_TOKENS = "forced_tokens"
STEP_SECONDS, STEP_SEQUENCES = "step_seconds", "step_sequences"
DRAFT_TOKENS, ACCEPTED_TOKENS = "speculative_draft_tokens", "speculative_accepted_tokens"

# Counted by the engine itself.
COUNTED = (
    MetricSpec("requests", COUNTER, "Requests that the engine took in"),
    MetricSpec("finished", COUNTER, "Requests that ended by themselves: end of text, stop string, length"),
    MetricSpec("cancelled", COUNTER, "Requests that were cancelled"),
    MetricSpec("timed_out", COUNTER, "Requests that exceeded a time limit, while they waited or ran"),
    MetricSpec("failed", COUNTER, "Requests that ended with an error"),
    MetricSpec("refused", COUNTER, "Requests that were refused: the queue was full, or the engine was stopping"),
    MetricSpec("steps", COUNTER, "Steps: each computes all running requests together"),
    MetricSpec(STEP_SECONDS, COUNTER, "Time spent in steps; divided by steps: the mean time of a step"),
    MetricSpec("slow_steps", COUNTER, "Steps that took longer than two seconds: the machine is slow or overloaded"),
    MetricSpec(STEP_SEQUENCES, COUNTER, "Requests in steps; divided by steps: the mean batch size"),
    MetricSpec("prompt_tokens", COUNTER, "Prompt tokens that were computed"),
    MetricSpec("generated_tokens", COUNTER, "Tokens that were generated"),
    MetricSpec(DRAFT_TOKENS, COUNTER, "Draft tokens of speculative decoding"),
    MetricSpec(ACCEPTED_TOKENS, COUNTER, "Draft tokens that were accepted"),
    MetricSpec(FORCED_TOKENS, COUNTER, "Generated tokens that a grammar forced, which needed no step of their own"),
    MetricSpec("cached_tokens", COUNTER, "Prompt tokens that came from the prefix cache"),
)
# Read from other parts of the engine.
OBSERVED = (
    MetricSpec("preemptions", COUNTER, "Times that a request lost its KV blocks to another request"),
    MetricSpec("running", GAUGE, "Requests that run"),
    MetricSpec("waiting", GAUGE, "Requests that wait for a slot"),
    MetricSpec("slots", GAUGE, "Requests that can run together (max_sequences)"),
    MetricSpec("kv_blocks", GAUGE, "Blocks of the KV cache"),
    MetricSpec("kv_blocks_used", GAUGE, "Blocks that running requests hold"),
    MetricSpec("kv_blocks_idle", GAUGE, "Blocks that no request holds and that the prefix cache keeps"),
    MetricSpec("adapters", GAUGE, "Adapters that are loaded"),
    MetricSpec("adapter_bytes", GAUGE, "Memory of the loaded adapters"),
    MetricSpec("adapter_loads", COUNTER, "Times that an adapter was loaded: at its first request, changed, or evicted"),
    MetricSpec("memory_bytes", GAUGE, "Memory that the engine uses now: resident, or on a GPU what torch has reserved"),
    MetricSpec("memory_reserved_bytes", GAUGE, "Memory that it may use at most: weights, process, KV cache, adapters"),
)
TIMED = (
    MetricSpec(QUEUE_SECONDS, HISTOGRAM, "From the arrival of a request to its first computed tokens", _SECONDS),
    MetricSpec(PREFILL_SECONDS, HISTOGRAM, "From the first computed tokens to the first generated token", _SECONDS),
    MetricSpec(DECODE_SECONDS, HISTOGRAM, "From the first generated token to the end", _SECONDS),
)
# Former names, exported with the same values. Dashboards and alerts of older releases use them.
ALIASES = {"guessed_tokens": DRAFT_TOKENS, "rightly_guessed_tokens": ACCEPTED_TOKENS, "places": "slots"}
_NAMED = {spec.name: spec for spec in (*COUNTED, *OBSERVED)}
ALIASED = tuple(
    MetricSpec(alias, _NAMED[name].kind, f"Former name of {_NAMED[name].prometheus_name}")
    for alias, name in ALIASES.items()
)
METRIC_SPECS = (*COUNTED, *OBSERVED, *TIMED, *ALIASED)


class Rate:
    """The amount per second over the last seconds."""

    def __init__(self, seconds: int = 5) -> None:
        # A ring buffer of (second, amount).
        self._amounts = [(0, 0.0)] * (seconds + 1)
        self._seconds = seconds

    def add(self, amount: float, now: float) -> None:
        second = int(now)
        index = second % len(self._amounts)
        kept, before = self._amounts[index]
        self._amounts[index] = (second, before + amount if kept == second else amount)

    def each_second(self, now: float) -> float:
        """The mean over the last whole seconds."""
        last = int(now) - 1
        return sum(amount for second, amount in self._amounts if 0 <= last - second < self._seconds) / self._seconds


class Metrics:
    """The values of one engine."""

    def __init__(self) -> None:
        self.generated = Rate()
        self.counted: dict[str, float] = {spec.name: 0 for spec in COUNTED}
        self._timed: dict[str, deque[float]] = {spec.name: deque(maxlen=_KEPT_TIMINGS) for spec in TIMED}

    def count(self, name: str, amount: float = 1) -> None:
        self.counted[name] += amount

    def time(self, name: str, seconds: float) -> None:
        self._timed[name].append(seconds)

    def take_timed(self) -> dict[str, list[float]]:
        """The timings since the last call. For a single reader."""
        return {name: _drain(timings) for name, timings in self._timed.items()}


def _drain(timings: deque[float]) -> list[float]:
    return [timings.popleft() for _ in range(len(timings))]


def with_aliases(values: Mapping[str, float]) -> dict[str, float]:
    """The values, with those of the former names."""
    return {**values} | {alias: values[name] for alias, name in ALIASES.items()}


def total(values: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sum of the values of several engines."""
    totals: dict[str, float] = {}
    for engine_values in values:
        for name, value in engine_values.items():
            totals[name] = totals.get(name, 0) + value
    return totals
