"""The engine's door: places and line, stop, retirement that lapses."""

from __future__ import annotations

import pytest
from engine.scheduling import admission as door
from engine.scheduling.admission import Door
from tritonlm.contract import Draining, NotLoaded, QueueFull


def test_as_many_come_in_as_there_are_places_and_a_line() -> None:
    found = Door(places=2, queue=1)
    for _ in range(3):
        found.enter()
    with pytest.raises(QueueFull, match="1 requests wait already"):
        found.enter()
    found.leave()
    found.enter()
    assert (found.inside, found.idle_seconds) == (3, 0.0)


def test_a_retirement_lapses_unless_it_is_said_again_and_a_stop_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(door.time, "monotonic", lambda: now)
    found = Door(1, 0)
    found.retire()
    now += door.RETIRED_SECONDS - 1
    found.retire()
    now += door.RETIRED_SECONDS - 1
    with pytest.raises(NotLoaded):
        found.enter()
    now += 2
    found.enter()
    found.leave()
    now += 7
    assert found.idle_seconds == 7
    found.drain()
    now += 1e6
    with pytest.raises(Draining):
        found.enter()
    # What a fault has interrupted may end.
    found.enter(goes_on=True)
    found.close()
    with pytest.raises(Draining):
        found.enter(goes_on=True)
