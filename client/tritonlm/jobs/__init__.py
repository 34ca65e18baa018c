"""Training jobs: a list on disk that outlives whoever keeps it, and a process of its own for each that runs.

It knows plans, processes and files; training itself happens in the child (`tritonlm train`), HTTP is the gateway's.
"""

from .manager import JobKeeper
from .store import Job, JobStore

__all__ = ["Job", "JobKeeper", "JobStore"]
