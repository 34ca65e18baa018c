"""The progress counter tells a slow engine from a hung one."""

from __future__ import annotations

import ctypes

import pytest
from engine.monitoring import progress as progress_module
from engine.monitoring.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def test_a_step_without_progress_stands_still(clock: Clock) -> None:
    progress = Progress()
    progress.begin()
    assert progress.still_seconds() == 0.0
    clock.now += 4.0
    assert progress.still_seconds() == 4.0
    assert progress.working_seconds() == 4.0


@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_step_with_progress_does_not_stand_still(clock: Clock, by_kernels: bool) -> None:
    progress = Progress()
    progress.begin()
    for _ in range(10):
        clock.now += 4.0
        if by_kernels:
            ctypes.c_uint64.from_address(progress.address).value += 1
        else:
            progress.advance()
        assert progress.still_seconds() == 0.0
    assert progress.working_seconds() == 40.0


def test_an_idle_engine_does_not_stand_still(clock: Clock) -> None:
    progress = Progress()
    progress.begin()
    progress.end()
    clock.now += 100.0
    assert progress.still_seconds() == 0.0
    progress.begin()
    assert progress.still_seconds() == 0.0, "time without work does not count"
    clock.now += 1.0
    assert progress.still_seconds() == 1.0
