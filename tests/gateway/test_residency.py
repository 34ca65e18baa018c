"""Model residency: many models share a small memory budget, and every request is answered."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fakes.fake_repository import FakeModel, FakeRepository
from tritonlm.contract import CheckpointError

from .conftest import Gateway, running_gateway


def ask(gateway: Gateway, model: str, **body: object) -> httpx.Response:
    request = {"model": model, "prompt": "a", "max_tokens": 3, **body}
    return httpx.post(f"{gateway.url}/v1/completions", json=request, timeout=60)


def loaded(repository: FakeRepository) -> set[str]:
    return {name for name, model in repository.repository.items() if model.loaded}


@pytest.mark.parametrize("room_for", [1, 3])
def test_ten_models_share_the_memory_of_few(room_for: int) -> None:
    repository = FakeRepository({f"lm{n}": FakeModel(10) for n in range(10)}, budget=10 * room_for + 5)
    rng = random.Random(room_for)
    requests = [(f"lm{rng.randrange(10)}", rng.random() < 0.5) for _ in range(200)]
    with running_gateway(repository) as gateway, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: ask(gateway, request[0], stream=request[1]), requests))
    assert [answer.status_code for answer in answers] == [200] * 200
    assert repository.most_taken <= repository.budget
    assert repository.interrupted == []


def test_the_least_recently_used_model_is_unloaded() -> None:
    repository = FakeRepository({name: FakeModel(10) for name in "abcd"}, budget=30)
    with running_gateway(repository) as gateway:
        for model in "abcab":
            assert ask(gateway, model).status_code == 200
        assert ask(gateway, "d").status_code == 200
        assert repository.unloaded == ["c"]
        assert loaded(repository) == {"a", "b", "d"}
        # A model's size is known after its first load, so that the next load succeeds at the first attempt.
        loads = repository.loads_of.total()
        assert ask(gateway, "c").status_code == 200
        assert (repository.unloaded, repository.loads_of.total()) == (["c", "a"], loads + 1)


def test_a_model_that_has_grown_frees_its_whole_claim_and_needs_less_when_loaded_again() -> None:
    repository = FakeRepository({name: FakeModel(10) for name in "abc"}, budget=30)
    with running_gateway(repository) as gateway:
        for model in "ab":
            assert ask(gateway, model).status_code == 200
        repository.repository["a"].grown = 10
        gateway.http.get("/v1/models")
        assert ask(gateway, "c").status_code == 200
        assert (repository.unloaded, loaded(repository)) == (["a"], {"b", "c"})
        assert ask(gateway, "a").status_code == 200
        assert (repository.unloaded, loaded(repository)) == (["a"], {"a", "b", "c"})


def test_a_large_model_replaces_several() -> None:
    repository = FakeRepository({"a": FakeModel(10), "b": FakeModel(10), "large": FakeModel(25)}, budget=30)
    with running_gateway(repository) as gateway:
        for model in ("a", "b", "large"):
            assert ask(gateway, model).status_code == 200
        assert loaded(repository) == {"large"}


def test_running_requests_end_before_their_model_is_unloaded() -> None:
    repository = FakeRepository({"a": FakeModel(10), "b": FakeModel(10)}, budget=10)
    with running_gateway(repository) as gateway, ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, gateway, "a", max_tokens=400, stream=True)
        gateway.wait_until(lambda: repository.repository["a"].running == 1)
        assert ask(gateway, "b").status_code == 200
        assert "[DONE]" in long.result().text
        assert repository.interrupted == []


def test_an_idle_model_is_unloaded_and_loaded_again_on_demand() -> None:
    models = {"short": FakeModel(1, idle_unload_seconds=0.4), "ever": FakeModel(1)}
    repository = FakeRepository(models, budget=10)
    with running_gateway(repository) as gateway:
        for model in models:
            assert ask(gateway, model).status_code == 200
        gateway.wait_until(lambda: repository.unloaded == ["short"])
        assert loaded(repository) == {"ever"}
        assert ask(gateway, "short").status_code == 200


def test_models_are_loaded_and_unloaded_by_name() -> None:
    repository = FakeRepository({name: FakeModel(10) for name in "ab"}, budget=10)
    with running_gateway(repository) as gateway:
        described = gateway.post("/api/models/a/load").json()
        assert (described["state"], described["memory_claimed_bytes"], described["memory_budget"]) == ("ready", 10, 10)
        assert (described["memory_bytes"], described["memory_reserved_bytes"]) == (9, 20)
        assert described["full_context_slots"] == 2
        assert gateway.post("/api/models/b/load").json()["state"] == "ready"
        assert loaded(repository) == {"b"}
        assert gateway.post("/api/models/b/unload").json()["state"] == "unavailable"
        assert loaded(repository) == set()
        for action in ("load", "unload"):
            assert gateway.post(f"/api/models/nothing/{action}").status_code == 404
        states = {model["id"]: model["state"] for model in gateway.http.get("/api/models").json()["models"]}
        assert states == {"a": "unavailable", "b": "unavailable"}


def test_a_model_that_never_fits_is_refused_without_unloading_others(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = FakeRepository({"a": FakeModel(10), "huge": FakeModel(100)}, budget=30)
    load = repository.load

    async def refuse(model: str, timeout: float) -> None:
        if model == "huge":
            raise CheckpointError("this model needs 100 MiB on cpu, and the memory budget is 30 MiB")
        await load(model, timeout)

    monkeypatch.setattr(repository, "load", refuse)
    with running_gateway(repository) as gateway:
        assert ask(gateway, "a").status_code == 200
        answer = ask(gateway, "huge")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "checkpoint_error")
        assert loaded(repository) == {"a"}


def test_a_load_times_out_while_the_other_models_stay_in_use() -> None:
    # `a` is loaded before and paused from the start, so that it stays busy on a slow machine, too.
    repository = FakeRepository({"a": FakeModel(10, loaded=True), "b": FakeModel(10)}, budget=10)
    repository.pause = 0.5
    with running_gateway(repository, load_seconds=0.5) as gateway, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, gateway, "a", max_tokens=500, n=2, stream=True)
        gateway.wait_until(lambda: repository.repository["a"].running > 0)
        answer = ask(gateway, "b")
        repository.pause = 0.0
        assert answer.status_code in (503, 504), answer.text
        assert long.result().status_code == 200
