"""Who goes first on cores that several processes share. It knows nothing of what they do."""

from __future__ import annotations

import os

_BEHIND = 5


def step_back() -> None:
    """Let the engine's steps go first, which all requests wait for: who interrupts one of its threads stops them all.

    It concerns this thread, and those that it starts.
    """
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), _BEHIND))
