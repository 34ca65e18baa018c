"""Training jobs: a persistent list, and one child process (`tritonlm train`) per running job.

It knows plans, processes and files. It does not know training or HTTP.
"""

from .manager import JobManager
from .store import Job, JobStore

__all__ = ["Job", "JobManager", "JobStore"]
