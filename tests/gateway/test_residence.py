"""Many models, little memory: every request is answered, the budget holds, and nobody's text is cut off."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fakes.fake_repository import FakeModel, FakeRepository
from tritonlm.contract import CheckpointError

from .conftest import Gateway, running_gateway


def ask(gateway: Gateway, model: str, **body: object) -> httpx.Response:
    wanted = {"model": model, "prompt": "a", "max_tokens": 3, **body}
    return httpx.post(f"{gateway.url}/v1/completions", json=wanted, timeout=60)


def loaded(found: FakeRepository) -> set[str]:
    return {name for name, model in found.found.items() if model.loaded}


@pytest.mark.parametrize("room_for", [1, 3])
def test_ten_models_share_the_room_of_few(room_for: int) -> None:
    found = FakeRepository({f"lm{n}": FakeModel(10) for n in range(10)}, budget=10 * room_for + 5)
    draw = random.Random(room_for)
    asked = [(f"lm{draw.randrange(10)}", draw.random() < 0.5) for _ in range(200)]
    with running_gateway(found) as gateway, ThreadPoolExecutor(16) as crowd:
        answers = list(crowd.map(lambda one: ask(gateway, one[0], stream=one[1]), asked))
    assert [answer.status_code for answer in answers] == [200] * 200
    assert found.most_taken <= found.budget
    assert found.cut_off == []


def test_the_least_recently_used_goes_and_the_others_stay() -> None:
    found = FakeRepository({name: FakeModel(10) for name in "abcd"}, budget=30)
    with running_gateway(found) as gateway:
        for model in "abcab":
            assert ask(gateway, model).status_code == 200
        assert ask(gateway, "d").status_code == 200
        assert found.unloaded == ["c"]
        assert loaded(found) == {"a", "b", "d"}
        # What a model takes is known once it has been loaded: nothing is tried in vain.
        tries = found.loads_of.total()
        assert ask(gateway, "c").status_code == 200
        assert (found.unloaded, found.loads_of.total()) == (["c", "a"], tries + 1)


def test_one_that_has_grown_gives_all_it_has_and_wants_less_when_it_comes_again() -> None:
    found = FakeRepository({name: FakeModel(10) for name in "abc"}, budget=30)
    with running_gateway(found) as gateway:
        for model in "ab":
            assert ask(gateway, model).status_code == 200
        found.found["a"].grown = 10
        gateway.http.get("/v1/models")
        assert ask(gateway, "c").status_code == 200
        assert (found.unloaded, loaded(found)) == (["a"], {"b", "c"})
        assert ask(gateway, "a").status_code == 200
        assert (found.unloaded, loaded(found)) == (["a"], {"a", "b", "c"})


def test_a_large_one_takes_the_place_of_several() -> None:
    found = FakeRepository({"a": FakeModel(10), "b": FakeModel(10), "large": FakeModel(25)}, budget=30)
    with running_gateway(found) as gateway:
        for model in ("a", "b", "large"):
            assert ask(gateway, model).status_code == 200
        assert loaded(found) == {"large"}


def test_what_runs_ends_before_its_model_goes() -> None:
    found = FakeRepository({"a": FakeModel(10), "b": FakeModel(10)}, budget=10)
    with running_gateway(found) as gateway, ThreadPoolExecutor(2) as crowd:
        long = crowd.submit(ask, gateway, "a", max_tokens=400, stream=True)
        gateway.wait_until(lambda: found.found["a"].running == 1)
        assert ask(gateway, "b").status_code == 200
        assert "[DONE]" in long.result().text
        assert found.cut_off == []


def test_an_idle_model_goes_in_time_and_comes_back_when_it_is_asked() -> None:
    models = {"short": FakeModel(1, idle_unload_seconds=0.4), "ever": FakeModel(1)}
    found = FakeRepository(models, budget=10)
    with running_gateway(found) as gateway:
        for model in models:
            assert ask(gateway, model).status_code == 200
        gateway.wait_until(lambda: found.unloaded == ["short"])
        assert loaded(found) == {"ever"}
        assert ask(gateway, "short").status_code == 200


def test_models_are_loaded_and_unloaded_by_name() -> None:
    found = FakeRepository({name: FakeModel(10) for name in "ab"}, budget=10)
    with running_gateway(found) as gateway:
        described = gateway.post("/api/models/a/load").json()
        assert (described["state"], described["memory_claimed_bytes"], described["memory_budget"]) == ("ready", 10, 10)
        assert (described["memory_bytes"], described["memory_reserved_bytes"]) == (9, 20)
        assert described["full_context_slots"] == 2
        assert gateway.post("/api/models/b/load").json()["state"] == "ready"
        assert loaded(found) == {"b"}
        assert gateway.post("/api/models/b/unload").json()["state"] == "unavailable"
        assert loaded(found) == set()
        for action in ("load", "unload"):
            assert gateway.post(f"/api/models/nothing/{action}").status_code == 404
        states = {model["id"]: model["state"] for model in gateway.http.get("/api/models").json()["models"]}
        assert states == {"a": "unavailable", "b": "unavailable"}


def test_one_that_never_fits_is_told_and_drives_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FakeRepository({"a": FakeModel(10), "huge": FakeModel(100)}, budget=30)
    load = found.load

    async def refuse(model: str, timeout: float) -> None:
        if model == "huge":
            raise CheckpointError("this model needs 100 MiB on cpu, and the memory budget is 30 MiB")
        await load(model, timeout)

    monkeypatch.setattr(found, "load", refuse)
    with running_gateway(found) as gateway:
        assert ask(gateway, "a").status_code == 200
        answer = ask(gateway, "huge")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "checkpoint_error")
        assert loaded(found) == {"a"}


def test_where_the_others_stay_in_use_the_wait_has_an_end() -> None:
    # Loaded before, and pausing from the start: on a slow machine, too, `a` is at work as long as it is wanted to be.
    found = FakeRepository({"a": FakeModel(10, loaded=True), "b": FakeModel(10)}, budget=10)
    found.pause = 0.5
    with running_gateway(found, load_seconds=0.5) as gateway, ThreadPoolExecutor(1) as crowd:
        long = crowd.submit(ask, gateway, "a", max_tokens=500, n=2, stream=True)
        gateway.wait_until(lambda: found.found["a"].running > 0)
        answer = ask(gateway, "b")
        found.pause = 0.0
        assert answer.status_code in (503, 504), answer.text
        assert long.result().status_code == 200
