"""Shared by the routes of older systems: the default model, and the types of common fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from tritonlm.client.request_fields import Integer
from tritonlm.contract import Unavailable

from ...services import Services

MaxTokens = Annotated[Integer, Field(ge=1, le=2048, description="maximum tokens to generate")]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 is greedy")]
TopK = Annotated[Integer | None, Field(ge=1, description="sample among the k likeliest tokens; null: all")]


async def default_model(services: Services) -> str:
    if services.settings.default_model:
        return services.settings.default_model
    models = (await services.client.models.list()).data
    # The first model that is ready. If none is, the only model, which the call will load.
    names = [model.id for model in models if model.state == "ready"] or [
        model.id for model in models if len(models) == 1
    ]
    if not names:
        raise Unavailable("no language model is loaded; name one in the field model", "model")
    return names[0]


def shown_model(services: Services, loaded: Collection[str]) -> str:
    """The model whose state is shown: the default model if it is one of the loaded ones, else the first of them."""
    default = services.settings.default_model
    return default if default and services.client.names.resolve(default).lm in loaded else next(iter(loaded))
