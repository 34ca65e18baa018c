"""What an engine counts: rates over seconds, values of several engines as one."""

from __future__ import annotations

import pytest
from engine.monitoring.metrics import QUEUE_SECONDS, Metrics, Rate, added
from hypothesis import given
from hypothesis import strategies as st


def test_a_rate_is_of_the_last_whole_seconds() -> None:
    rate = Rate(5)
    for second in range(100, 110):
        rate.add(20.0, second + 0.25)
        rate.add(10.0, second + 0.75)
    assert rate.each_second(110.1) == 30.0
    assert rate.each_second(112.5) == pytest.approx(18.0)
    assert rate.each_second(200.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=60), st.floats(30, 60))
def test_a_rate_counts_what_a_list_of_all_would(added_at: list[tuple[float, int]], now: float) -> None:
    rate = Rate(5)
    for moment, amount in sorted(added_at):
        rate.add(amount, moment)
    whole = sum(amount for moment, amount in added_at if int(now) - 5 <= int(moment) < int(now))
    assert rate.each_second(now) == pytest.approx(whole / 5)


def test_what_was_timed_is_taken_once() -> None:
    metrics = Metrics()
    metrics.time(QUEUE_SECONDS, 0.5)
    assert metrics.take_timed()[QUEUE_SECONDS] == [0.5]
    assert metrics.take_timed()[QUEUE_SECONDS] == []


def test_several_engines_are_added() -> None:
    assert added([{"running": 1, "steps": 5}, {"running": 2, "steps": 7}]) == {"running": 3, "steps": 12}
