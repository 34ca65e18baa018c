"""What Locust's counters say of a window of time: percentiles, rates, failures. It knows Locust's statistics alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from locust.stats import RequestStats, StatsEntry

FIRST, BETWEEN, SPEED = "first text", "between tokens", "tokens/s"
_OURS = (FIRST, BETWEEN, SPEED)


@dataclass
class _Seen:
    times: Counter[float] = field(default_factory=Counter)
    length: int = 0
    requests: int = 0
    failures: int = 0


def _look(stats: RequestStats) -> dict[str, _Seen]:
    found = {name: _Seen() for name in (*_OURS, "requests")}
    for entry in list(stats.entries.values()):
        seen = found[entry.method if entry.method in _OURS else "requests"]
        _add(seen, entry)
    return found


def _add(seen: _Seen, entry: StatsEntry) -> None:
    seen.times.update(dict(entry.response_times))
    seen.length += entry.total_content_length
    seen.requests += entry.num_requests
    seen.failures += entry.num_failures


def percentile(times: Counter[float], share: float) -> float:
    """Milliseconds; 0 where nothing was seen."""
    left = share * times.total()
    for time in sorted(times):
        left -= times[time]
        if left <= 0:
            return float(time)
    return 0.0


class Window:
    """From its making to `close`."""

    def __init__(self, stats: RequestStats) -> None:
        self._stats, self._before = stats, _look(stats)
        self.first = self.between = self.first_median = self.between_median = 0.0
        self.requests_per_second = self.tokens_per_second = self.failures = 0.0

    def close(self, seconds: float) -> Window:
        now = _look(self._stats)
        first, between = self._times(now, FIRST), self._times(now, BETWEEN)
        self.first, self.first_median = percentile(first, 0.95), percentile(first, 0.5)
        self.between, self.between_median = percentile(between, 0.95), percentile(between, 0.5)
        requests = now["requests"].requests - self._before["requests"].requests
        failed = now["requests"].failures - self._before["requests"].failures
        self.requests_per_second = requests / seconds
        self.failures = failed / requests if requests else 0.0
        # Told at a stream's end: of those that ended in this window.
        tokens = now[SPEED].length - self._before[SPEED].length
        self.tokens_per_second = tokens / seconds
        return self

    def _times(self, now: dict[str, _Seen], name: str) -> Counter[float]:
        return now[name].times - self._before[name].times
