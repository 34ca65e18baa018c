"""Starts, watches and stops a local Triton that serves language models.

It controls Triton as a process and with a few HTTP calls. It does not know tensors, requests or text.
`supervisor.serve` is the entry point. It is not imported here, so that the gateway starts without it.
"""

from .errors import ServingError
from .settings import Settings, read_settings

__all__ = ["ServingError", "Settings", "read_settings"]
