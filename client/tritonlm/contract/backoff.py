"""How long to pause after several failures in a row. It does not know what failed."""

from __future__ import annotations

# A float overflows after a thousand doublings, which hours without a server reach; every limit is reached before these.
_MAX_DOUBLINGS = 60


def doubled(first: float, times: int, limit: float) -> float:
    """`first`, doubled this many times, at most `limit`."""
    return min(first * 2.0 ** min(times, _MAX_DOUBLINGS), limit)
