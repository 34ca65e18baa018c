"""Percentiles, rates and failures in a window of time, from Locust's statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from locust.stats import RequestStats, StatsEntry

FIRST, BETWEEN, SPEED = "first text", "between tokens", "tokens/s"
_STREAM_METRICS = (FIRST, BETWEEN, SPEED)


@dataclass
class _Totals:
    times: Counter[float] = field(default_factory=Counter)
    length: int = 0
    requests: int = 0
    failures: int = 0


def _snapshot(stats: RequestStats) -> dict[str, _Totals]:
    totals = {name: _Totals() for name in (*_STREAM_METRICS, "requests")}
    for entry in list(stats.entries.values()):
        _add(totals[entry.method if entry.method in _STREAM_METRICS else "requests"], entry)
    return totals


def _add(totals: _Totals, entry: StatsEntry) -> None:
    totals.times.update(dict(entry.response_times))
    totals.length += entry.total_content_length
    totals.requests += entry.num_requests
    totals.failures += entry.num_failures


def percentile(times: Counter[float], share: float) -> float:
    """Milliseconds; 0 if there are no measurements."""
    left = share * times.total()
    for time in sorted(times):
        left -= times[time]
        if left <= 0:
            return float(time)
    return 0.0


class Window:
    """The measurements between its creation and `close`."""

    def __init__(self, stats: RequestStats) -> None:
        self._stats, self._before = stats, _snapshot(stats)
        self.first = self.between = self.first_median = self.between_median = 0.0
        self.requests_per_second = self.tokens_per_second = self.failures = 0.0

    def close(self, seconds: float) -> Window:
        now = _snapshot(self._stats)
        first, between = self._times(now, FIRST), self._times(now, BETWEEN)
        self.first, self.first_median = percentile(first, 0.95), percentile(first, 0.5)
        self.between, self.between_median = percentile(between, 0.95), percentile(between, 0.5)
        requests = now["requests"].requests - self._before["requests"].requests
        failed = now["requests"].failures - self._before["requests"].failures
        self.requests_per_second = requests / seconds
        self.failures = failed / requests if requests else 0.0
        # Reported at a stream's end, so it counts the streams that ended in this window.
        tokens = now[SPEED].length - self._before[SPEED].length
        self.tokens_per_second = tokens / seconds
        return self

    def _times(self, now: dict[str, _Totals], name: str) -> Counter[float]:
        return now[name].times - self._before[name].times
