"""Shared Tritons for the tests that need no settings of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonlm.serving.paths import model_repository

from .servers import ENGINE, LM, Server, copy_repository, running
from .test_serve import Serve, serving

SLOTS = QUEUE = 4
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session", autouse=True)
def no_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ignore API keys that exist in this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONLM_KEYS", str(tmp_path_factory.mktemp("keys") / "keys.json"))
        yield


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = copy_repository(tmp_path_factory.mktemp("shared"))
    record = {"step": 2920, "val_loss": 0.2627}
    (repository / LM / "1" / "training.json").write_text(json.dumps(record), encoding="utf-8")
    # Texts arrive in many chunks, however fast they are computed.
    with (repository / ENGINE / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "chunk_milliseconds" value: { string_value: "0" } }\n')
    return repository


@pytest.fixture(scope="session")
def shared_server(repository: Path) -> Iterator[Server]:
    with running(repository) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared Triton. A test must leave it without running or waiting requests."""
    yield shared_server
    assert shared_server.holds_nothing(), shared_server.status()


@pytest.fixture(scope="session")
def shared_small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = copy_repository(tmp_path_factory.mktemp("small"), slow="reference")
    with (repository / ENGINE / "config.pbtxt").open("a") as config:
        config.write(f'parameters {{ key: "max_queue_size" value: {{ string_value: "{QUEUE}" }} }}\n')
    (repository / LM / "1" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with running(repository, max_sequences=SLOTS) as server:
        yield server


@pytest.fixture
def small_server(shared_small_server: Server) -> Iterator[Server]:
    """A Triton with four slots, a queue of four, a chat template, and a slow LM."""
    yield shared_small_server
    assert shared_small_server.holds_nothing(), shared_small_server.status()


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The bundled language models, served as on a fresh clone."""
    with serving(model_repository(), tmp_path_factory.mktemp("bundled")) as serve:
        yield serve
