"""The scheduling priority of threads on cores that several processes share."""

from __future__ import annotations

import os

_NICENESS = 5


def lower_thread_priority() -> None:
    """Give the engine's compute threads precedence: every request waits for their slowest one.

    It applies to the calling thread and the threads that it starts.
    """
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), _NICENESS))
