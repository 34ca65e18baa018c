"""Starts, watches and stops a local Triton that serves language models.

It talks to Triton as a process and over a few HTTP calls; tensors, requests and text are other rooms' matter.
`supervisor.serve` does it all; it is not imported here, so that a gateway starts without it.
"""

from .errors import ServingError
from .settings import Settings, read_settings

__all__ = ["ServingError", "Settings", "read_settings"]
