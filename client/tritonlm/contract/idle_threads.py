"""How the idle threads of numeric libraries wait: asleep. It knows names of environment variables, no library.

Threads that spin take the cores of this machine's other processes, which serve the same requests. The libraries read
the variables when they are imported.
"""

from __future__ import annotations

import os

# numpy's BLAS starts its threads with the import, where they spin for some 2**26 cycles; 2**4 is its least.
ASLEEP = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}


def sleep_when_idle() -> None:
    """For this process, and those that it starts; a variable that is set stays."""
    for name, value in ASLEEP.items():
        os.environ.setdefault(name, value)
