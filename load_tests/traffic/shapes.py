"""The number of users over time: constant, steps, a spike, and a search for the highest rate within a goal.

Shapes know the time and, for the search, the measurements since the last step. Locust starts the users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from locust import LoadTestShape
from measures import Window

_SPAWN_RATE = 50.0
Tick = tuple[int, float] | None


@dataclass(frozen=True)
class Goal:
    """The maximum 95th percentiles in milliseconds, and the maximum share of failed requests."""

    first: float
    between: float
    failures: float

    def is_met(self, window: Window) -> bool:
        return window.first <= self.first and window.between <= self.between and window.failures <= self.failures


class Shape(LoadTestShape):
    abstract = True
    users = 16
    seconds = 60.0
    goal = Goal(500.0, 100.0, 0.0)

    def succeeded(self, total: Window) -> bool:
        """Whether the measurements of the whole run meet the goal."""
        return self.goal.is_met(total)


class Constant(Shape):
    """A constant number of users; with a long duration, a soak test."""

    def tick(self) -> Tick:
        return (self.users, _SPAWN_RATE) if self.get_run_time() < self.seconds else None


class Steps(Shape):
    """From an eighth of the users to all of them, in eight steps."""

    def tick(self) -> Tick:
        step = int(self.get_run_time() / self.seconds * 8)
        return (max(1, round(self.users * (step + 1) / 8)), _SPAWN_RATE) if step < 8 else None


class Spike(Shape):
    """A tenth of the users, and all of them during the middle fifth of the time."""

    def tick(self) -> Tick:
        share = self.get_run_time() / self.seconds
        if share >= 1:
            return None
        return (self.users if 0.4 <= share < 0.6 else max(1, self.users // 10), _SPAWN_RATE)


class Saturation(Shape):
    """Doubles the users while the goal is met, then searches between the last two steps by bisection."""

    step_seconds = 12.0
    # The beginning of a step is not measured, since requests of the last step still run.
    settling_seconds = 4.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._now, self._met, self._missed = max(1, self.users // 16), 0, 0
        self._since = 0.0
        self._window: Window | None = None
        # The most users that met the goal, and their measurements.
        self.best: tuple[int, Window] | None = None
        self.steps: list[tuple[int, Window, bool]] = []

    def tick(self) -> Tick:
        passed = self.get_run_time() - self._since
        assert self.runner is not None
        if self._window is None and passed >= self.settling_seconds:
            self._window = Window(self.runner.stats)
        if self._window is not None and passed >= self.step_seconds:
            self._finish_step(self._window.close(passed - self.settling_seconds))
            self._since, self._window = self.get_run_time(), None
            if self._missed and self._missed - self._met <= max(1, self._met // 10):
                return None
        return (self._now, _SPAWN_RATE) if self.get_run_time() < self.seconds else None

    def succeeded(self, total: Window) -> bool:
        """A search exceeds the goal on purpose; it succeeds if it has found a rate within the goal."""
        return self.best is not None

    def _finish_step(self, window: Window) -> None:
        met = self.goal.is_met(window)
        self.steps.append((self._now, window, met))
        if met:
            self._met = self._now
            self.best = (self._now, window)
        else:
            self._missed = self._now
        self._now = (self._met + self._missed) // 2 if self._missed else self._now * 2
        self._now = max(1, self._now)


SHAPES: dict[str, type[Shape]] = {"constant": Constant, "steps": Steps, "spike": Spike, "saturation": Saturation}
