"""Ten language models where there is memory for three; and what nobody uses leaves."""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fakes.tiny_lm import make_checkpoint
from tritonlm.serving.paths import model_repository
from tritonlm.serving.registry import add_entry, make_entry

from .servers import wait_until
from .test_catalogue import http_of, text_of
from .test_serve import Serve, serving

pytestmark = pytest.mark.triton

MODELS, ROOM_FOR, REQUESTS = 10, 3, 200
FEW_PLACES: dict[str, Any] = {"max_sequences": 16}
IDLE: dict[int, dict[str, Any]] = {0: {"idle_unload_seconds": 2}}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten language models that tell different things, with a small cache so that the processes weigh alike."""
    folder = tmp_path_factory.mktemp("ten")
    for number in range(MODELS):
        path = make_checkpoint(folder / f"lm{number}", seed=number)
        add_entry(
            folder / "models.yaml", make_entry(name=f"lm{number}", path=path, **FEW_PLACES, **IDLE.get(number, {}))
        )
    return folder / "models.yaml"


def described(http: httpx.Client) -> dict[str, dict[str, object]]:
    return {model["id"]: model for model in http.get("/v1/models").json()["data"]}


def engines_in_memory(serve: Serve) -> int:
    """Resident bytes of all processes of this server that hold an engine."""
    total = 0
    for process in psutil.Process(serve.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("-generate/1/model.py" in word for word in process.cmdline()):
                total += process.memory_info().rss
    return total


def test_ten_models_with_memory_for_three(registry: Path, tmp_path: Path) -> None:
    draw = random.Random(4)
    asked = [f"lm{draw.randrange(MODELS)}" for _ in range(REQUESTS)]
    options = ["--registry", str(registry), "--load", "lm1"]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        alone = {model: text_of(http, model) for model in ("lm0", "lm1", "lm2")}
        lm1 = described(http)["lm1"]
        needed = lm1["memory_bytes"]
        assert isinstance(needed, int)
        assert isinstance(lm1["memory_reserved_bytes"], int)
        assert needed <= lm1["memory_reserved_bytes"]
        assert lm1["full_context_slots"] == FEW_PLACES["max_sequences"]
    assert len(set(alone.values())) == 3
    # Hardly less than for one more: a process that starts takes some room before it can ask for it.
    budget = int(needed * (ROOM_FOR + 0.9))
    options += ["--memory-budget", str(budget)]
    most, stop = [0], threading.Event()
    # Every load starts processes anew: whoever asks last waits for all that others asked for.
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve, 600) as http:

        def watch() -> None:
            while not stop.wait(0.1):
                most[0] = max(most[0], engines_in_memory(serve))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(100) as crowd:
                texts = list(crowd.map(lambda model: text_of(http, model), asked))
        finally:
            stop.set()
            watcher.join()
        found = described(http)
    for model, text in alone.items():
        assert {other for name, other in zip(asked, texts, strict=True) if name == model} == {text}
    assert 1 <= sum(model["state"] == "ready" for model in found.values()) <= ROOM_FOR
    assert needed < most[0] <= budget


def test_fifty_first_requests_cause_one_load(registry: Path, tmp_path: Path) -> None:
    options = ["--registry", str(registry), "--load", "lm1", "--log-level", "debug"]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        with ThreadPoolExecutor(50) as crowd:
            assert len(set(crowd.map(lambda _: text_of(http, "lm2"), range(50)))) == 1
        assert serve.output.read_text().count("loading: lm2-generate:") == 1


def test_an_idle_model_is_unloaded_and_comes_back(registry: Path, tmp_path: Path) -> None:
    options = ["--registry", str(registry), "--load", "lm1"]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        first = text_of(http, "lm0")
        wait_until(lambda: described(http)["lm0"]["state"] == "unavailable", "the idle one has gone")
        assert described(http)["lm1"]["state"] == "ready"
        assert text_of(http, "lm0") == first


def test_two_engines_of_one_model_share_its_requests(registry: Path, tmp_path: Path) -> None:
    """As with two GPUs; here both compute on the CPU."""
    options = ["--registry", str(registry), "--load", "lm3", "--device", "cpu,cpu"]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        assert described(http)["lm3"]["device"] == "cpu,cpu"
        assert described(http)["lm3"]["places"] == 2 * FEW_PLACES["max_sequences"]
        with ThreadPoolExecutor(24) as crowd:
            assert len(set(crowd.map(lambda _: text_of(http, "lm3"), range(48)))) == 1
