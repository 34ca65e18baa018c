"""Property tests from /openapi.json: no server errors, responses as documented, invalid requests refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from fakes.fake_transport import LM, FakeTransport
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tritonlm import AsyncClient
from tritonlm.access.keys import SCOPES, KeyFile, Limits
from tritonlm.gateway.app import create_app
from tritonlm.gateway.limits.scopes import PUBLIC_PATHS, scope_of
from tritonlm.gateway.settings import GatewaySettings

from .conftest import Gateway, running_gateway
from .short_arrays import with_short_arrays


def operations_of(schema: Any) -> dict[str, Any]:
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


DOCUMENT = create_app(AsyncClient(transports=[FakeTransport()]), GatewaySettings()).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
# Every body's size has a limit, which is documented with its status; a body that is too large is not read any further.
REJECTION = SCHEMA.config.checks.negative_data_rejection
REJECTION.expected_statuses = [*REJECTION.expected_statuses, "413"]
OPERATIONS = operations_of(SCHEMA)
# Some rules are not in the schema, since they depend on another field or on the model, such as best_of >= n.
BEYOND_SCHEMA = [positive_data_acceptance]
TRAINING = [
    label for label in OPERATIONS if any(part in label for part in ("/api/train", "/api/jobs", "DELETE /v1/models"))
]
# For each route and mode. A hundred take twice as long; what they reach beyond these, named cases of other tests reach.
_EXAMPLES = 40
# Refused with 501 as documented: this gateway does not train.
NOT_OFFERED = {label: [not_a_server_error] for label in TRAINING}


@functools.cache
def short_operations() -> dict[str, Any]:
    """To generate requests from. The document itself judges them."""
    return operations_of(schemathesis.openapi.from_dict(with_short_arrays(DOCUMENT)))


def cases(label: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    """Requests with short arrays, which the document itself allows, or refuses."""

    def judge(case: Any) -> Any:
        case.operation = OPERATIONS[label]
        if mode is GenerationMode.NEGATIVE:
            # Of what makes the request invalid, the document does not have the bounds of short arrays: by setting the
            # body, it is checked again.
            case.body = case.body
        return case

    generated = short_operations()[label].as_strategy(generation_mode=mode).map(judge)
    return generated.filter(lambda case: case.meta.generation.mode is mode)


@functools.cache
def session() -> requests.Session:
    """Keeps connections: a session and a connection for each request take longer than the request itself."""
    session = requests.Session()
    # Looking for proxies takes long, too.
    session.trust_env = False
    return session


def validated(gateway: Gateway, case: Any, excluded: Sequence[Any] = ()) -> Any:
    """The response, which is as documented."""
    checks = [*BEYOND_SCHEMA, *excluded]
    return case.call_and_validate(base_url=gateway.url, session=session(), excluded_checks=checks)


def storing(folder: Path) -> dict[str, Any]:
    """The settings that switch on what writes files, except training."""
    files = {"response_store": "responses.sqlite", "batch_folder": "batches", "adapters_folder": "adapters"}
    return {setting: folder / name for setting, name in files.items()}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(**storing(tmp_path_factory.mktemp("stores"))) as running:
        yield running


@pytest.fixture(scope="module")
def training_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("training")
    settings = {"runs_folder": folder / "runs", "data_folder": folder / "data", "registry": folder / "models.yaml"}
    with running_gateway(training=True, **settings) as running:
        yield running
        # The generated requests started no training and wrote nothing.
        assert running.http.get("/api/jobs").json() == {"jobs": []}
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", list(OPERATIONS))
def test_every_route_is_as_documented(gateway: Gateway, label: str, mode: GenerationMode) -> None:
    check_operation(gateway, label, mode, NOT_OFFERED.get(label, []))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", TRAINING)
def test_every_training_route_is_as_documented(training_gateway: Gateway, label: str, mode: GenerationMode) -> None:
    check_operation(training_gateway, label, mode, [])


# Generated names of models and ids of files are unknown, and the schema says little of some fields: these requests have
# known ones, and reach the code behind.
_MESSAGES = [{"role": "user", "content": "a"}]
KNOWN_FIELDS: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {},
    "POST /v1/responses": {},
    "POST /v1/responses/input_tokens": {},
    "POST /v1/messages": {"messages": _MESSAGES, "max_tokens": 4},
    "POST /v1/messages/count_tokens": {"messages": _MESSAGES},
    "POST /v1/score": {},
    "POST /v1/rerank": {},
    "POST /v1/decisions": {"input": "A fox.", "questions": [{"type": "predicate", "instructions": "Is it red?"}]},
    "POST /apply-template": {},
}
KNOWN_ID = [
    label for label in OPERATIONS
    if any(f"/v1/{name}/{{" in label for name in ("responses", "files", "batches"))
]  # fmt: skip


@pytest.mark.parametrize("label", KNOWN_FIELDS)
def test_a_route_is_as_documented_for_a_known_model(gateway: Gateway, label: str) -> None:
    assert check_known(gateway, label, lambda case: case.body.update(model=LM, **KNOWN_FIELDS[label]))


def test_batches_are_as_documented_for_a_known_file(gateway: Gateway) -> None:
    file = upload(gateway)
    assert check_known(gateway, "POST /v1/batches", lambda case: case.body.update(input_file_id=file))


@pytest.mark.parametrize("label", KNOWN_ID)
def test_a_route_is_as_documented_for_a_known_id(gateway: Gateway, label: str) -> None:
    def make() -> str:
        if "responses" in label:
            return str(gateway.post("/v1/responses", model=LM, input="a", max_output_tokens=2).json()["id"])
        if "files" in label:
            return upload(gateway)
        return new_batch(gateway)

    known = make()

    def change(case: Any) -> None:
        (name,) = case.path_parameters
        # What is deleted needs a new one each time.
        case.path_parameters[name] = make() if label.startswith("DELETE") else known

    succeeded = check_known(gateway, label, change)
    # The batch may have ended before it is cancelled.
    assert succeeded or label.endswith("/cancel")


def new_batch(gateway: Gateway) -> str:
    """The id of a batch of one request; earlier ones may have to end first."""
    body = {"input_file_id": upload(gateway), "endpoint": "/v1/completions", "completion_window": "24h"}
    answers: list[dict[str, Any]] = []

    def create() -> bool:
        answers.append(gateway.post("/v1/batches", **body).json())
        return "id" in answers[-1]

    gateway.wait_until(create)
    return str(answers[-1]["id"])


def upload(gateway: Gateway) -> str:
    """The id of a file of one request."""
    body = {"model": LM, "prompt": "a", "max_tokens": 2}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    answer = gateway.http.post("/v1/files", files={"file": ("in.jsonl", json.dumps(line))}, data={"purpose": "batch"})
    return str(answer.json()["id"])


def check_known(gateway: Gateway, label: str, change: Callable[[Any], None]) -> int:
    """Check requests that `change` has changed; the number of those that succeeded."""
    succeeded = 0

    @settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(label, GenerationMode.POSITIVE))
    def hold(case: Any) -> None:
        nonlocal succeeded
        change(case)
        succeeded += validated(gateway, case).status_code == 200

    hold()
    return succeeded


def test_every_route_requires_its_scope_for_any_data(tmp_path: Path) -> None:
    """No route fails, and a key with another scope gets 403."""
    file = KeyFile(tmp_path / "keys.json")
    secrets = {scope: file.create(scope, [scope], Limits()) for scope in SCOPES}
    with running_gateway(keys=file.path, **storing(tmp_path)) as gateway:
        for label in OPERATIONS:
            check_scopes(gateway, label, secrets)


def check_scopes(gateway: Gateway, label: str, secrets: dict[str, str]) -> None:
    """Send each request with the key of each scope: generating it takes longer than sending it."""
    operation = OPERATIONS[label]
    path = operation.path.replace("{", "").replace("}", "")
    required = scope_of(operation.method.upper(), path)

    @settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(label, GenerationMode.POSITIVE))
    def hold(case: Any) -> None:
        for scope, secret in secrets.items():
            authorization = {"Authorization": f"Bearer {secret}"}
            answer = case.call(base_url=gateway.url, session=session(), headers=authorization)
            assert answer.status_code < 500 or (label in TRAINING and answer.status_code == 501)
            is_allowed = path in PUBLIC_PATHS or required == scope
            assert is_allowed or answer.status_code == 403, scope

    hold()


def check_operation(gateway: Gateway, label: str, mode: GenerationMode, excluded: list[Any]) -> None:
    if mode is GenerationMode.NEGATIVE and not takes_input(label):
        return

    @settings(max_examples=_EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(label, mode))
    def hold(case: Any) -> None:
        validated(gateway, case, excluded)

    hold()


def test_a_body_that_is_too_large_is_refused_as_documented(gateway: Gateway) -> None:
    """The limit of a body is a limit of the server, not of its schema: each of these choices is valid alone."""

    @settings(max_examples=1, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=OPERATIONS["POST /v1/completions"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def hold(case: Any) -> None:
        case.path_parameters, case.query, case.headers, case.cookies = {}, {}, {}, {}
        case.body = {"model": "fake", "prompt": "a", "guided_choice": [*(["x" * 2**18] * 17), 1]}
        answer = validated(gateway, case)
        assert answer.status_code == 413

    hold()


def takes_input(label: str) -> bool:
    operation = OPERATIONS[label]
    # Any text is a valid path parameter.
    return bool(operation.body) or bool(operation.query)
