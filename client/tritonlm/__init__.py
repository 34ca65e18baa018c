"""tritonlm: serve Hugging Face causal language models from an NVIDIA Triton model repository.

`from tritonlm import Client, AsyncClient`. They are imported when they are asked for, so that importing one room
(`tritonlm.contract`) imports no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonlm.client import AsyncClient
    from tritonlm.inference_client import InferenceClient
    from tritonlm.sync import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "InferenceClient", "__version__"]

_ROOMS = {"AsyncClient": "client", "Client": "sync", "InferenceClient": "inference_client"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"tritonlm.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
