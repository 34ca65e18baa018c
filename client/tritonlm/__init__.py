"""tritonlm: serve Hugging Face causal language models from an NVIDIA Triton model repository.

`from tritonlm import Client, AsyncClient`. They are imported when they are asked for, so that importing one room
(`tritonlm.contract`) imports no other.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonlm.client import AsyncClient
    from tritonlm.sync import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from tritonlm.client import AsyncClient  # noqa: PLC0415

        return AsyncClient
    if name == "Client":
        from tritonlm.sync import Client  # noqa: PLC0415

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
