"""The client library: `AsyncClient`, `Client`, and the transport through which they reach a Triton.

    from tritonlm.client import AsyncClient, Client

The names are imported on first use, so that importing one module (`tritonlm.client.types`) imports no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_client import AsyncClient
    from .inference_client import InferenceClient
    from .sync import Client

__all__ = ["AsyncClient", "Client", "InferenceClient"]

_MODULES = {"AsyncClient": "async_client", "Client": "sync", "InferenceClient": "inference_client"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
