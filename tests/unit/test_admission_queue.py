"""The admission queue: slots and queue, drain, and a retirement that lapses."""

from __future__ import annotations

import pytest
from engine.scheduling import admission
from engine.scheduling.admission import AdmissionQueue
from tritonlm.contract import Draining, NotLoaded, QueueFull


def test_the_slots_and_the_queue_limit_the_admitted_requests() -> None:
    queue = AdmissionQueue(slots=2, queue_size=1)
    for _ in range(3):
        queue.enter()
    with pytest.raises(QueueFull, match="1 requests wait already"):
        queue.enter()
    queue.leave()
    queue.enter()
    assert (queue.in_flight, queue.idle_seconds) == (3, 0.0)


def test_a_retirement_lapses_unless_it_is_repeated_and_a_drain_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: now)
    queue = AdmissionQueue(1, 0)
    queue.retire()
    now += admission.RETIRED_SECONDS - 1
    queue.retire()
    now += admission.RETIRED_SECONDS - 1
    with pytest.raises(NotLoaded):
        queue.enter()
    now += 2
    queue.enter()
    queue.leave()
    now += 7
    assert queue.idle_seconds == 7
    queue.drain()
    now += 1e6
    with pytest.raises(Draining):
        queue.enter()
    # A resumed request may still end.
    queue.enter(resumed=True)
    queue.close()
    with pytest.raises(Draining):
        queue.enter(resumed=True)
