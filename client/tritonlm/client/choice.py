"""Which Triton is asked next: the one with the fewest running calls, or the one that has read this prompt before.

One that failed is left out for a while, longer each time, and tried again when the while is over. It counts its own
calls alone, and knows nothing of what they carry.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence

from tritonlm.client.transport import Call, Transport

_FIRST_REST_SECONDS, _LONGEST_REST_SECONDS = 0.5, 15.0
_LATELY_SECONDS = 60.0
# Beginnings of prompts this long are worth finding in a cache again, with so many more calls than the others at most.
_CHARACTERS, _IDS, _MORE_CALLS = 256, 64, 4


class Choice:
    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = list(transports)
        self._turns = itertools.count()
        self._running: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}
        self._answered: dict[str, float] = {}

    def next(self, call: Call | None = None, after: Transport | None = None) -> Transport:
        """Of those that do not rest; of all, where all do, the one whose rest ends first. `after` is the one that has
        just failed this call: where there is another one, it is not asked again."""
        now, turn = time.monotonic(), next(self._turns)
        count = len(self._transports)
        order = [self._transports[(turn + offset) % count] for offset in range(count)]
        awake = [transport for transport in order if self._rests_until.get(transport.url, 0.0) <= now]
        awake = [transport for transport in awake if transport is not after] or awake
        if not awake:
            return min(order, key=lambda transport: self._rests_until[transport.url])
        fewest = min(awake, key=lambda transport: self._running[transport.url])
        beginning = _beginning(call) if call is not None and len(awake) > 1 else b""
        if beginning:
            # The same for every gateway, with nothing to remember.
            known = max(awake, key=lambda t: hashlib.blake2b(beginning + t.url.encode(), digest_size=8).digest())
            if self._running[known.url] <= self._running[fewest.url] + _MORE_CALLS:
                return known
        return fewest

    def begin(self, transport: Transport) -> None:
        self._running[transport.url] += 1

    def end(self, transport: Transport) -> None:
        self._running[transport.url] -= 1

    def answered(self, transport: Transport) -> None:
        self._answered[transport.url] = time.monotonic()
        if self._failures[transport.url]:
            del self._failures[transport.url]
            self._rests_until.pop(transport.url, None)

    def has_failed(self, transport: Transport) -> bool:
        """Whether it has not answered since it failed."""
        return bool(self._failures[transport.url])

    def failed(self, transport: Transport) -> None:
        """Let it rest; who fails while it rests already, came before, and tells little new."""
        now = time.monotonic()
        if (until := self._rests_until.get(transport.url, 0.0)) > now:
            self._rests_until[transport.url] = max(until, now + _FIRST_REST_SECONDS)
            return
        rest = min(_FIRST_REST_SECONDS * 2.0 ** self._failures[transport.url], _LONGEST_REST_SECONDS)
        self._failures[transport.url] += 1
        self._rests_until[transport.url] = now + rest

    def answered_lately(self) -> bool:
        """Whether any Triton has answered in the last minute: then a silence now is a fault that will be mended."""
        return time.monotonic() - max(self._answered.values(), default=float("-inf")) < _LATELY_SECONDS


def _beginning(call: Call) -> bytes:
    """What calls with the same long beginning have in common; empty for short prompts."""
    prompt = call.prompt
    text = prompt.text or prompt.messages or ""
    if len(text) >= _CHARACTERS:
        return text[:_CHARACTERS].encode("utf-8", "replace")
    if prompt.input_ids is not None and len(prompt.input_ids) >= _IDS:
        return repr(prompt.input_ids[:_IDS]).encode()
    return b""
