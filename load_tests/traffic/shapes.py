"""How many users there are when: steps, a spike, a long calm, and a search for the highest rate within a goal.

They know the clock and, for the search, what was measured since the last step; they start nothing.
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
    """What a caller must not wait longer for, at the 95th percentile, in milliseconds; and how many may fail."""

    first: float
    between: float
    failures: float

    def is_kept(self, window: Window) -> bool:
        return window.first <= self.first and window.between <= self.between and window.failures <= self.failures


class Shape(LoadTestShape):
    abstract = True
    users = 16
    seconds = 60.0
    goal = Goal(500.0, 100.0, 0.0)


class Constant(Shape):
    """The same all the time: a soak, when it is long."""

    def tick(self) -> Tick:
        return (self.users, _SPAWN_RATE) if self.get_run_time() < self.seconds else None


class Steps(Shape):
    """From an eighth of the users to all of them, in eight steps."""

    def tick(self) -> Tick:
        step = int(self.get_run_time() / self.seconds * 8)
        return (max(1, round(self.users * (step + 1) / 8)), _SPAWN_RATE) if step < 8 else None


class Spike(Shape):
    """A tenth of the users, and in the middle fifth of the time all of them at once."""

    def tick(self) -> Tick:
        share = self.get_run_time() / self.seconds
        if share >= 1:
            return None
        return (self.users if 0.4 <= share < 0.6 else max(1, self.users // 10), _SPAWN_RATE)


class Saturation(Shape):
    """Doubles the users while the goal is kept, and then halves what is between the last two until it is found."""

    step_seconds = 12.0
    # Of a step's beginning nothing is judged: it belongs to the last one still.
    settling_seconds = 4.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._now, self._kept, self._broken = max(1, self.users // 16), 0, 0
        self._since = 0.0
        self._window: Window | None = None
        self.found: tuple[int, Window] | None = None
        self.steps: list[tuple[int, Window, bool]] = []

    def tick(self) -> Tick:
        passed = self.get_run_time() - self._since
        assert self.runner is not None
        if self._window is None and passed >= self.settling_seconds:
            self._window = Window(self.runner.stats)
        if self._window is not None and passed >= self.step_seconds:
            self._judge(self._window.close(passed - self.settling_seconds))
            self._since, self._window = self.get_run_time(), None
            if self._broken and self._broken - self._kept <= max(1, self._kept // 10):
                return None
        return (self._now, _SPAWN_RATE) if self.get_run_time() < self.seconds else None

    def _judge(self, window: Window) -> None:
        kept = self.goal.is_kept(window)
        self.steps.append((self._now, window, kept))
        if kept:
            self._kept = self._now
            self.found = (self._now, window)
        else:
            self._broken = self._now
        self._now = (self._kept + self._broken) // 2 if self._broken else self._now * 2
        self._now = max(1, self._now)


SHAPES: dict[str, type[Shape]] = {"constant": Constant, "steps": Steps, "spike": Spike, "saturation": Saturation}
