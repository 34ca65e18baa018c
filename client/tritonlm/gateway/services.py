"""The objects that the routes of one gateway share, and the FastAPI dependency that passes them to a handler.

It names them; `app` makes them from the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from tritonlm.client.async_client import AsyncClient

from .batches.store import BatchStore
from .history import History
from .limits.admission import AdmissionQueue
from .limits.quota import Quota
from .metrics import LiveValues
from .models.adapters import AdapterService
from .models.loading import Loader
from .models.training import TrainingService
from .response_store import ResponseStore
from .settings import GatewaySettings


@dataclass(frozen=True)
class Services:
    client: AsyncClient
    settings: GatewaySettings
    adapters: AdapterService
    admission: AdmissionQueue
    history: History
    live_values: LiveValues
    loader: Loader
    quota: Quota
    # None: responses are not stored.
    response_store: ResponseStore | None
    training: TrainingService
    # None: there are no files and batches.
    batches: BatchStore | None


async def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


# The type of a handler's parameter that receives the services.
ServicesParameter = Annotated[Services, Depends(services_of)]
