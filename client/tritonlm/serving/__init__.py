"""Starts, watches and stops a local Triton that serves language models.

It talks to Triton as a process and over a few HTTP calls; tensors, requests and text are other rooms' matter.
"""

from .errors import ServingError
from .settings import Settings, read_settings
from .supervisor import serve

__all__ = ["ServingError", "Settings", "read_settings", "serve"]
