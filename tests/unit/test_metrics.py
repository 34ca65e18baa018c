"""The values of an engine: rates, timings, and the sum over several engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from engine.engine import Engine
from engine.fleet import Fleet
from engine.monitoring.metrics import ALIASES, METRIC_SPECS, QUEUE_SECONDS, Metrics, Rate, total, with_aliases
from hypothesis import given
from hypothesis import strategies as st


def test_a_rate_is_the_mean_of_the_last_whole_seconds() -> None:
    rate = Rate(5)
    for second in range(100, 110):
        rate.add(20.0, second + 0.25)
        rate.add(10.0, second + 0.75)
    assert rate.each_second(110.1) == 30.0
    assert rate.each_second(112.5) == pytest.approx(18.0)
    assert rate.each_second(200.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=60), st.floats(30, 60))
def test_a_rate_equals_a_sum_over_all_amounts(added_at: list[tuple[float, int]], now: float) -> None:
    rate = Rate(5)
    for moment, amount in sorted(added_at):
        rate.add(amount, moment)
    whole = sum(amount for moment, amount in added_at if int(now) - 5 <= int(moment) < int(now))
    assert rate.each_second(now) == pytest.approx(whole / 5)


def test_timings_are_returned_once() -> None:
    metrics = Metrics()
    metrics.time(QUEUE_SECONDS, 0.5)
    assert metrics.take_timed()[QUEUE_SECONDS] == [0.5]
    assert metrics.take_timed()[QUEUE_SECONDS] == []


def test_the_values_of_several_engines_are_summed() -> None:
    assert total([{"running": 1, "steps": 5}, {"running": 2, "steps": 7}]) == {"running": 3, "steps": 12}


@pytest.mark.parametrize(
    ("devices", "memory"), [(("cpu", "cpu"), 50), (("cuda:0", "cuda:1"), 100), (("cuda:0", "cuda:0", "cuda:1"), 100)]
)
def test_engines_on_one_device_count_its_memory_once(devices: tuple[str, ...], memory: int) -> None:
    values = {"running": 2, "memory_bytes": 50}
    engines = [
        SimpleNamespace(runner=SimpleNamespace(device=device), metric_values=lambda: dict(values)) for device in devices
    ]
    assert Fleet(cast(list[Engine], engines)).metric_values() == {"running": 2 * len(devices), "memory_bytes": memory}


def test_former_names_have_the_same_values() -> None:
    values = with_aliases({spec.name: float(number) for number, spec in enumerate(METRIC_SPECS)})
    assert {alias: values[alias] for alias in ALIASES} == {alias: values[name] for alias, name in ALIASES.items()}
