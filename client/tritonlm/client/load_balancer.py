"""Chooses the Triton for each call: the one with the fewest running calls, or the one with the prompt's prefix cached.

A Triton that failed is avoided for a growing backoff time. The balancer counts the calls of its own client only, and
does not look at their content beyond the prompt's prefix.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence

from tritonlm.client.transport import Call, Transport
from tritonlm.contract.backoff import doubled

_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 15.0
_RECENT_SECONDS = 60.0
# Prompts share a cache entry by this many leading characters or ids. The Triton that has it may run this many more
# calls than the least busy one.
_PREFIX_CHARACTERS, _PREFIX_IDS, _MAX_EXTRA_CALLS = 256, 64, 4


class LoadBalancer:
    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = list(transports)
        self._picks = itertools.count()
        self._running: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._backoff_until: dict[str, float] = {}
        self._last_response: dict[str, float] = {}

    def pick(self, call: Call | None = None, failed: Transport | None = None) -> Transport:
        """One of the Tritons that are not in backoff; if all are, the one whose backoff ends first. `failed` has just
        failed this call and is used only if there is no other."""
        now, first = time.monotonic(), next(self._picks)
        count = len(self._transports)
        order = [self._transports[(first + offset) % count] for offset in range(count)]
        usable = [transport for transport in order if self._backoff_until.get(transport.url, 0.0) <= now]
        usable = [transport for transport in usable if transport is not failed] or usable
        if not usable:
            return min(order, key=lambda transport: self._backoff_until[transport.url])
        least_busy = min(usable, key=lambda transport: self._running[transport.url])
        prefix = _prefix(call) if call is not None and len(usable) > 1 else b""
        if prefix:
            # Rendezvous hashing: every gateway picks the same Triton without shared state.
            cached = max(usable, key=lambda t: hashlib.blake2b(prefix + t.url.encode(), digest_size=8).digest())
            if self._running[cached.url] <= self._running[least_busy.url] + _MAX_EXTRA_CALLS:
                return cached
        return least_busy

    def call_started(self, transport: Transport) -> None:
        self._running[transport.url] += 1

    def call_ended(self, transport: Transport) -> None:
        self._running[transport.url] -= 1

    def mark_healthy(self, transport: Transport) -> None:
        """It has responded: end its backoff."""
        self._last_response[transport.url] = time.monotonic()
        if self._failures[transport.url]:
            del self._failures[transport.url]
            self._backoff_until.pop(transport.url, None)

    def is_failing(self, transport: Transport) -> bool:
        """Whether it has failed and has not responded since."""
        return bool(self._failures[transport.url])

    def mark_failed(self, transport: Transport) -> None:
        """Start or extend its backoff. A failure during a backoff belongs to an older call and does not double it."""
        now = time.monotonic()
        if (until := self._backoff_until.get(transport.url, 0.0)) > now:
            self._backoff_until[transport.url] = max(until, now + _FIRST_BACKOFF_SECONDS)
            return
        backoff = doubled(_FIRST_BACKOFF_SECONDS, self._failures[transport.url], _MAX_BACKOFF_SECONDS)
        self._failures[transport.url] += 1
        self._backoff_until[transport.url] = now + backoff

    def responded_recently(self) -> bool:
        """Whether any Triton responded in the last minute. If so, a silent one is a fault that will be repaired."""
        return time.monotonic() - max(self._last_response.values(), default=float("-inf")) < _RECENT_SECONDS


def _prefix(call: Call) -> bytes:
    """The beginning of a long prompt, with what else tells its blocks in a cache apart; empty for a short one."""
    prompt, apart = call.prompt, f"{call.parameters.get('adapter', '')}\0{call.parameters.get('cache_salt', '')}\0"
    text = prompt.text or prompt.messages or ""
    if len(text) >= _PREFIX_CHARACTERS:
        return (apart + text[:_PREFIX_CHARACTERS]).encode("utf-8", "replace")
    if prompt.input_ids is not None and len(prompt.input_ids) >= _PREFIX_IDS:
        return (apart + repr(prompt.input_ids[:_PREFIX_IDS])).encode()
    return b""
