"""Adapters that are put aside for want of room: each is tried again as soon as it has some, whatever made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.adapters.loaded import LoadedAdapter
from engine.adapters.peft_files import WEIGHTS
from fakes.adapter_store import BYTES, Adapters, Make, stores
from tritonlm.contract import CheckpointError


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with stores(tmp_path) as make:
        yield make


def filled(make: Make, **limits: int) -> Adapters:
    """A store with the files of `a`, `b`, `c`, `large`, and of `huge`, which exceeds its memory."""
    adapters = make(**limits)
    adapters.write("a", "b", "c", "huge")
    adapters.write_large()
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 32]}}).encode()
    (adapters.folder / "huge" / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    return adapters


def put_aside(adapters: Adapters, name: str) -> None:
    """Request an adapter that has no room."""
    adapters.request(name)
    # This refusal shows that the loading thread has dealt with what came before.
    adapters.refusal("huge")
    assert adapters.idle


def next_name(adapters: Adapters) -> str:
    loaded = adapters.next()
    assert isinstance(loaded, LoadedAdapter), loaded
    return loaded.name


def test_one_behind_an_adapter_that_fails_is_loaded(make: Make) -> None:
    adapters = filled(make, max_adapters=1)
    used = adapters.acquire("a")
    put_aside(adapters, "b")
    adapters.seconds = 6
    put_aside(adapters, "c")
    (adapters.folder / "b" / WEIGHTS).unlink()
    adapters.store.release(used)
    assert isinstance(adapters.next(), CheckpointError)
    assert next_name(adapters) == "c"


def test_a_small_one_behind_a_large_one_is_loaded_beside_it(make: Make) -> None:
    adapters = filled(make, adapter_memory=3 * BYTES)
    used = [adapters.acquire("a"), adapters.acquire("b")]
    put_aside(adapters, "large")
    adapters.seconds = 6
    put_aside(adapters, "c")
    adapters.store.release(used[0])
    assert [next_name(adapters), next_name(adapters)] == ["large", "c"]


def test_a_further_request_takes_the_room_that_no_other_waits_for_any_more(make: Make) -> None:
    adapters = filled(make, adapter_memory=2 * BYTES, queue_seconds=60)
    adapters.acquire("a")
    put_aside(adapters, "large")
    adapters.seconds = 30
    put_aside(adapters, "b")
    adapters.seconds = 60
    adapters.request("b")
    assert [next_name(adapters), next_name(adapters)] == ["b", "b"]
