"""What the older systems' routes share: the model that answers where none is named, and two ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tritonlm.client.async_client import AsyncClient
from tritonlm.contract import Unavailable

from ...schemas import Integer
from ...settings import GatewaySettings

MaxTokens = Annotated[Integer, Field(ge=1, le=2048, description="tokens to generate at most")]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 is greedy")]
TopK = Annotated[Integer | None, Field(ge=1, description="sample among the k likeliest tokens; null: all")]


async def default_model(client: AsyncClient, settings: GatewaySettings) -> str:
    if settings.default_model:
        return settings.default_model
    found = (await client.models.list()).data
    # The first that is ready; where none is, the only one there is: it will be loaded.
    ready = [model.id for model in found if model.state == "ready"] or [model.id for model in found if len(found) == 1]
    if not ready:
        raise Unavailable("no language model is loaded; name one in the field model", "model")
    return ready[0]
