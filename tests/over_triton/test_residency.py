"""Model residency: ten language models with memory for three, and unloading of idle models."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
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
from .test_model_registry import http_of, text_of
from .test_serve import Serve, serving

pytestmark = pytest.mark.triton

MODELS, MAX_RESIDENT, REQUESTS = 10, 3, 200
FEW_SLOTS: dict[str, Any] = {"max_sequences": 16}
IDLE: dict[int, dict[str, Any]] = {0: {"idle_unload_seconds": 2}}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten language models with different outputs, and a small cache so that their processes have equal size."""
    folder = tmp_path_factory.mktemp("ten")
    for number in range(MODELS):
        path = make_checkpoint(folder / f"lm{number}", seed=number)
        add_entry(
            folder / "models.yaml", make_entry(name=f"lm{number}", path=path, **FEW_SLOTS, **IDLE.get(number, {}))
        )
    return folder / "models.yaml"


@pytest.fixture(scope="module")
def unlimited(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A server without a memory budget, with lm1 loaded. The other models are loaded by their first requests."""
    options = ["--registry", str(registry), "--load", "lm1", "--log-level", "debug"]
    with serving(model_repository(), tmp_path_factory.mktemp("unlimited"), *options) as serve:
        yield serve


def models_by_id(http: httpx.Client) -> dict[str, dict[str, object]]:
    return {model["id"]: model for model in http.get("/v1/models").json()["data"]}


def engine_memory(serve: Serve) -> int:
    """Resident bytes of all engine processes of this server."""
    total = 0
    for process in psutil.Process(serve.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("-generate/1/model.py" in word for word in process.cmdline()):
                total += process.memory_info().rss
    return total


def test_ten_models_with_memory_for_three(unlimited: Serve, registry: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    requested = [f"lm{rng.randrange(MODELS)}" for _ in range(REQUESTS)]
    with http_of(unlimited) as http:
        alone = {model: text_of(http, model) for model in ("lm0", "lm1", "lm2")}
        lm1 = models_by_id(http)["lm1"]
        needed = lm1["memory_bytes"]
        assert isinstance(needed, int)
        assert isinstance(lm1["memory_reserved_bytes"], int)
        assert needed <= lm1["memory_reserved_bytes"]
        assert lm1["full_context_slots"] == FEW_SLOTS["max_sequences"]
    assert len(set(alone.values())) == 3
    # Almost the memory for one more: a starting process uses some memory before it can claim it.
    budget = int(needed * (MAX_RESIDENT + 0.9))
    options = ["--registry", str(registry), "--load", "lm1", "--memory-budget", str(budget)]
    peak, stop = [0], threading.Event()
    # Every load starts new processes: the last request waits for all loads before it.
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve, 600) as http:

        def measure_peak() -> None:
            while not stop.wait(0.1):
                peak[0] = max(peak[0], engine_memory(serve))

        thread = threading.Thread(target=measure_peak)
        thread.start()
        try:
            with ThreadPoolExecutor(100) as pool:
                texts = list(pool.map(lambda model: text_of(http, model), requested))
        finally:
            stop.set()
            thread.join()
        models = models_by_id(http)
    for model, text in alone.items():
        assert {other for name, other in zip(requested, texts, strict=True) if name == model} == {text}
    assert 1 <= sum(model["state"] == "ready" for model in models.values()) <= MAX_RESIDENT
    assert needed < peak[0] <= budget


def test_fifty_concurrent_first_requests_cause_one_load(unlimited: Serve) -> None:
    with http_of(unlimited) as http:
        with ThreadPoolExecutor(50) as pool:
            assert len(set(pool.map(lambda _: text_of(http, "lm4"), range(50)))) == 1
        assert unlimited.output.read_text().count("loading: lm4-generate:") == 1


def test_an_idle_model_is_unloaded_and_loaded_again(unlimited: Serve) -> None:
    with http_of(unlimited) as http:
        first = text_of(http, "lm0")
        wait_until(lambda: models_by_id(http)["lm0"]["state"] == "unavailable", "the idle model is unloaded")
        assert models_by_id(http)["lm1"]["state"] == "ready"
        assert text_of(http, "lm0") == first


def test_two_engines_of_one_model_share_its_requests(registry: Path, tmp_path: Path) -> None:
    """As with two GPUs; here both engines use the CPU."""
    options = ["--registry", str(registry), "--load", "lm3", "--device", "cpu,cpu"]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        assert models_by_id(http)["lm3"]["device"] == "cpu,cpu"
        assert models_by_id(http)["lm3"]["slots"] == 2 * FEW_SLOTS["max_sequences"]
        with ThreadPoolExecutor(24) as pool:
            assert len(set(pool.map(lambda _: text_of(http, "lm3"), range(48)))) == 1
