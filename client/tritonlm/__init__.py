"""tritonlm: serve Hugging Face causal language models from an NVIDIA Triton model repository.

`from tritonlm import Client, AsyncClient`. The names are imported on first use, so that importing one package
(`tritonlm.contract`) imports no other.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonlm.client import AsyncClient, Client, InferenceClient

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "InferenceClient", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tritonlm import client  # noqa: PLC0415 (imported on first use)

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
