"""Our own /openapi.json held to: no failure of ours, every answer as documented, what the schema forbids refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fakes.fake_transport import FakeTransport
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tritonlm import AsyncClient
from tritonlm.access.keys import SCOPES, KeyFile, Limits
from tritonlm.gateway.app import create_app
from tritonlm.gateway.scopes import OPEN, scope_of
from tritonlm.gateway.settings import GatewaySettings

from .conftest import Gateway, running_gateway

SCHEMA = schemathesis.openapi.from_dict(
    create_app(AsyncClient(transports=[FakeTransport()]), GatewaySettings()).openapi()
)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
# What depends on another field, or on the model, no schema tells: best_of below n, more tokens than the context …
BEYOND_SCHEMA = [positive_data_acceptance]
TRAINING = [label for label in OPERATIONS if "/api/train" in label or "/api/jobs" in label or "DELETE" in label]
# Refused with 501 as documented: nothing is trained here.
NOT_OFFERED = {label: [not_a_server_error] for label in TRAINING}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway() as found:
        yield found


@pytest.fixture(scope="module")
def training_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("training")
    settings = {"runs_folder": folder / "runs", "data_folder": folder / "data", "registry": folder / "models.yaml"}
    with running_gateway(training=True, **settings) as found:
        yield found
        # Whatever was sent, no training was begun by accident, and nothing was written.
        assert found.http.get("/api/jobs").json() == {"jobs": []}
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", list(OPERATIONS))
def test_every_route_is_as_documented(gateway: Gateway, label: str, mode: GenerationMode) -> None:
    hold_to(gateway, label, mode, NOT_OFFERED.get(label, []))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", TRAINING)
def test_every_route_of_training_is_as_documented_where_one_may_train(
    training_gateway: Gateway, label: str, mode: GenerationMode
) -> None:
    hold_to(training_gateway, label, mode, [])


@pytest.mark.parametrize("scope", SCOPES)
def test_every_route_keeps_to_its_scope_whatever_is_sent(tmp_path: Path, scope: str) -> None:
    """Nothing fails; and who has another scope gets no further, with data of any kind."""
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("caller", [scope], Limits())
    with running_gateway(keys=file.path) as gateway:
        for label in OPERATIONS:
            hold_to_scope(gateway, label, scope, secret)


def hold_to_scope(gateway: Gateway, label: str, scope: str, secret: str) -> None:
    operation = OPERATIONS[label]
    path = operation.path.replace("{", "").replace("}", "")
    is_ours = path in OPEN or scope_of(operation.method.upper(), path) == scope

    @settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def hold(data: st.DataObject) -> None:
        case: Any = data.draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        answer = case.call(base_url=gateway.url, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code < 500 or (label in TRAINING and answer.status_code == 501)
        assert is_ours or answer.status_code == 403

    hold()


def hold_to(gateway: Gateway, label: str, mode: GenerationMode, excluded: list[Any]) -> None:
    if mode is GenerationMode.NEGATIVE and not takes_input(label):
        return

    @settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def hold(data: st.DataObject) -> None:
        case: Any = data.draw(OPERATIONS[label].as_strategy(generation_mode=mode))
        case.call_and_validate(base_url=gateway.url, excluded_checks=[*BEYOND_SCHEMA, *excluded])

    hold()


def takes_input(label: str) -> bool:
    operation = OPERATIONS[label]
    # Any text can stand in a path.
    return bool(operation.body) or bool(operation.query)
